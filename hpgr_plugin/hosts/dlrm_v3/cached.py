"""The plan of candidates that the layers score over cached keys and values."""

from typing import Any

from torch import Tensor

from hpgr_plugin.components.attention_hooks import AttentionHook, HookInputs
from hpgr_plugin.hosts.dlrm_v3.attention import CandidateRows
from hpgr_plugin.ops.compact.parts import SequenceParts
from hpgr_plugin.ops.jagged import complete_cumsum


def cached_candidates(
    hook: AttentionHook | None,
    *,
    contextual_len: int,
    history_lengths: Tensor,
    num_candidates: Tensor,
    cached_lengths: Tensor | None = None,
    **inputs: Any,
) -> CandidateRows:
    """The mask of the candidates' rows.

    Args:
        hook: The model's, or None.
        contextual_len: Tokens in front of every history.
        history_lengths: `[B]`.
        num_candidates: Rows that `cached_forward` gets for each user `[B]`, all equal.
        cached_lengths: Rows in the cache `[B]`; None: contextual tokens and history.
        **inputs: Those of `HookInputs` by name, without the offsets: `history_embeddings` `[T, D]`
            and `candidate_embeddings` `[C, D]`, raw rows of the item table;
            `history_timestamps` `[T]` and `candidate_timestamps` `[C]` in seconds; for a hook with
            table="frozen" also `history_ids` and `candidate_ids`.

    Raises:
        RuntimeError: The hook's layout is not "shared_history".
    """
    if hook is None or hook.layout != "shared_history":
        got = "no hook" if hook is None else f"layout {hook.layout!r}"
        raise RuntimeError(
            f'cached_preferences needs an attention_hook of layout "shared_history", got {got}'
        )
    if cached_lengths is None:
        cached_lengths = history_lengths + contextual_len
    parts = SequenceParts(
        seq_offsets=complete_cumsum((cached_lengths + num_candidates).long()),
        history_offsets=complete_cumsum(history_lengths.long()),
        candidate_offsets=complete_cumsum(num_candidates.long()),
        contextual_len=contextual_len,
        num_history=len(inputs["history_embeddings"]),
        num_candidates=len(inputs["candidate_embeddings"]),
    )
    plan = hook.plan(
        HookInputs(
            history_offsets=parts.history_offsets,
            candidate_offsets=parts.candidate_offsets,
            **inputs,
        )
    )
    assert plan is not None
    return CandidateRows(parts, plan, hook.mask_position)
