"""What a batch's plan asks of the transducer."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hpgr_plugin.components.attention_hooks import AttentionHook, Layout, MaskPosition
from hpgr_plugin.components.sem import SessionContext
from hpgr_plugin.hosts.dlrm_v3.features import Features
from hpgr_plugin.hosts.dlrm_v3.positions import batch_places
from hpgr_plugin.hosts.dlrm_v3.selection import FullPlaces, KeptHistory, RankingBatch, keep
from hpgr_plugin.ops.compact.parts import SequenceParts
from hpgr_plugin.ops.preference_plan import PreferencePlan


@dataclass(frozen=True)
class Request:
    """What the transducer should do in one forward pass.

    Attributes:
        parts: Of the sequences `[contextual | history | candidates]` that its layers get.
        plan: By the histories of these sequences; its rows are candidates, or users; None keeps all
            history.
        max_targets: The most candidates of a user, or more.
        layout: That of the plan.
        mask_position: "post" A' = SiLU(s) * M, "pre" A' = SiLU(M * s).
        hide_future: Whether, without a plan of candidates, history at or after a candidate's own
            time is hidden from it (a plan of candidates hides it already).
        by_user: Whether row b of the plan keeps the whole history of sequence b, as it is here.
        full_length: The longest sequence before any was shortened; None: none was.
        longest_row: An upper bound of the items in a row of the plan; None: unknown.
        places: Where the rows are in the full sequences; None: the sequences are whole.
        context: SEM's, of the full histories; None: SEM runs on the sequences as they come.
        weight_scale: Factor `[1]` of the weights of all rows, or None. A padded pass brings in
            with it what `full_length` would be.
    """

    parts: SequenceParts
    plan: PreferencePlan | None
    max_targets: int
    layout: Layout = "shared_history"
    mask_position: MaskPosition = "post"
    hide_future: bool = True
    by_user: bool = False
    full_length: int | None = None
    longest_row: int | None = None
    places: FullPlaces | None = None
    context: SessionContext | None = None
    weight_scale: Tensor | None = None


def request_of(
    batch: RankingBatch,
    plan: PreferencePlan | None,
    features: Features,
    *,
    encoder: Any,
    hook: AttentionHook | None,
    hide_future: bool,
) -> tuple[Request, KeptHistory | None]:
    """What a plan asks for, and what it keeps of the histories; None: they stay whole.

    Args:
        batch: As looked up.
        plan: By its histories, or None.
        features: Of the host's configuration.
        encoder: The transducer's positional encoder, or None.
        hook: That made the plan.
        hide_future: See `Request`.
    """
    times, most = features.times(batch), batch.max_num_candidates
    longest_row = 0
    if plan is not None and hook is not None:
        longest_row = hook.longest_row(plan, batch.max_uih_len)
    if plan is None or hook is None or hook.layout == "shared_history":
        parts = features.parts(batch, batch.history_offsets, len(times[0]))
        whole = Request(
            parts,
            plan,
            most,
            mask_position="post" if hook is None else hook.mask_position,
            hide_future=hide_future,
            longest_row=longest_row,
            places=batch_places(encoder, batch, times, parts, None),
        )
        return whole, None
    kept = keep(
        plan,
        batch.history_offsets,
        num_history=len(times[0]),
        max_history=batch.max_uih_len,
        longest_row=longest_row,
        by_user=hook.layout == "per_user" or features.one_candidate_each(batch),
    )
    parts = features.parts(batch, kept.offsets, len(kept.rows))
    shortened = Request(
        parts,
        kept.plan,
        most,
        hook.layout,
        hook.mask_position,
        hide_future,
        by_user=kept.by_user,
        full_length=batch.max_uih_len + most + parts.contextual_len,
        longest_row=longest_row,
        places=batch_places(encoder, batch, times, parts, kept.rows),
    )
    return shortened, kept
