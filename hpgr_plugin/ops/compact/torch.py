"""The sequence layout: one short sequence per candidate, made from a plan.

Exact when positions, time features and the 1/n of attention are those of the full sequence:
encode first, then compact, and keep the full sequence's norm.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from hpgr_plugin.ops.jagged import ranges, segment_ids
from hpgr_plugin.ops.preference_plan.plan import PreferencePlan


class CompactSequences(NamedTuple):
    """C sequences, each the kept history of a candidate followed by the candidate.

    Attributes:
        history_tokens: `[P]` int64, where the tokens `plan.index` of the history lie in the
            compact sequences.
        candidate_tokens: `[C]` int64, where the candidates lie: the last token of each.
        offsets: `[C + 1]` int64.
        column_weights: `[P + C]`, M_j of every token; 1 for the candidates.
        candidate_of: `[P + C]` int64, the candidate each token belongs to.
        user_of: `[C]` int64, the user of each candidate.
        full_lengths: `[C]` int64, N_b + 1: the length each sequence had before.
    """

    history_tokens: Tensor
    candidate_tokens: Tensor
    offsets: Tensor
    column_weights: Tensor
    candidate_of: Tensor
    user_of: Tensor
    full_lengths: Tensor


def compact_sequences(
    plan: PreferencePlan, history_offsets: Tensor, candidate_offsets: Tensor
) -> CompactSequences:
    """Lay out the short sequences of a plan whose rows are candidates.

    Args:
        plan: of the layout "per_candidate", C rows.
        history_offsets: `[B + 1]`.
        candidate_offsets: `[B + 1]`.

    Raises:
        ValueError: the plan has another number of rows than there are candidates.
    """
    num_candidates, kept = plan.offsets.numel() - 1, plan.index.numel()
    if int(candidate_offsets[-1]) != num_candidates:
        raise ValueError(
            f"plan must have a row per candidate: {num_candidates} rows, but candidate_offsets "
            f"end at {int(candidate_offsets[-1])}"
        )
    places = torch.arange(num_candidates + 1, device=plan.offsets.device)
    offsets = plan.offsets + places
    candidate_tokens = offsets[1:] - 1
    # Every candidate before a history token pushes it on by one.
    history_tokens = ranges(offsets[:-1], plan.offsets.diff())
    column_weights = plan.weights.new_ones(kept + num_candidates)
    column_weights[history_tokens] = plan.weights
    user_of = segment_ids(candidate_offsets, num_candidates)
    return CompactSequences(
        history_tokens=history_tokens,
        candidate_tokens=candidate_tokens,
        offsets=offsets,
        column_weights=column_weights,
        candidate_of=segment_ids(offsets, kept + num_candidates),
        user_of=user_of,
        full_lengths=history_offsets.long().diff()[user_of] + 1,
    )


def gather_tokens(
    compact: CompactSequences, plan: PreferencePlan, history: Tensor, candidates: Tensor
) -> Tensor:
    """Token values of the short sequences: `[T, ...]` and `[C, ...]` to `[P + C, ...]`.

    Also for timestamps, positions or anything else that is one value per token.
    """
    tokens = history.new_empty(len(compact.column_weights), *history.shape[1:])
    tokens = tokens.index_copy(0, compact.history_tokens, history[plan.index])
    return tokens.index_copy(0, compact.candidate_tokens, candidates)
