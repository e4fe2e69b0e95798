"""The `attention_hook` slot: preference-guided sparse attention (PGSA), or stochastic length.

A hook plans which history items are kept, and with what weight. The host carries the plan out: it
gathers the kept rows (layouts "per_candidate" and "per_user") or weighs the candidate's row of the
attention (layout "shared_history"). It reads the plan, `layout` and `mask_position`, nothing else.
"""

import logging
import math
from collections.abc import MutableMapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpgr_plugin.components.checks import check_at_least, check_choice
from hpgr_plugin.components.layout_cost import ChosenLayout, choose_layout, layout_rows
from hpgr_plugin.errors import HpgrError
from hpgr_plugin.ops.jagged import complete_cumsum, jagged_to_padded_dense, segment_ids
from hpgr_plugin.ops.preference_plan import (
    PlanInputs,
    PlanSettings,
    PreferencePlan,
    most_kept,
    plan_preferences,
)

_LOG = logging.getLogger(__name__)
_CANDIDATE_LAYOUTS: tuple[ChosenLayout, ...] = ("per_candidate", "shared_history")

Layout = Literal["per_candidate", "shared_history", "per_user"]
MaskPosition = Literal["post", "pre"]
Table = Literal["live", "frozen"]
Score = Literal["dot", "cosine"]
Selection = Literal["weighted", "recent", "uniform"]


@dataclass(frozen=True)
class HookInputs(PlanInputs):
    """What a hook sees of a batch: the inputs of a plan, and which items they are.

    The embeddings are raw rows of the item table; `history_timestamps` may be given without
    `candidate_timestamps`, and then no item is hidden.

    Attributes:
        history_ids: `[T]`, rows of the item table.
        candidate_ids: `[C]`, rows of the item table.
    """

    history_ids: Tensor | None = None
    candidate_ids: Tensor | None = None


class AttentionHook(nn.Module):
    """The interface of the `attention_hook` slot.

    Attributes:
        layout: what a row of the plan belongs to, and what the host does with it.
            "per_candidate": a candidate; every (user, candidate) pair is one shortened sequence.
            "shared_history": a candidate; the history stays whole, and the row is the candidate's
            weights on it.
            "per_user": a user; the history is shortened once, for all candidates of the user.
        mask_position: where the weights M enter the attention with scores s (bias included):
            "post" `A' = SiLU(s) * M`, "pre" `A' = SiLU(M * s)`.
    """

    layout: Layout = "per_candidate"
    mask_position: MaskPosition = "post"

    def decide_layout(self, *, max_history: int, max_candidates: int) -> None:
        """The host's call before the first batch: a hook may choose its layout by these bounds.

        Args:
            max_history: items of the longest history.
            max_candidates: the most candidates of a user.
        """

    def plan(self, inputs: HookInputs) -> PreferencePlan | None:
        """What is kept of each history, one row per candidate or user (see `layout`).

        Returns:
            The plan, or None to leave every history whole.
        """
        raise NotImplementedError

    def longest_row(self, plan: PreferencePlan, max_history: int) -> int:
        """An upper bound of the items in one row of a plan.

        Args:
            plan: made by this hook.
            max_history: the longest history that it was made for.
        """
        if plan.offsets.is_cuda:
            return max_history
        return plan.longest()  # nothing to wait for, and less padding


class PreferenceGuidedSparseAttention(AttentionHook):
    """PGSA (Eq. 5): a candidate attends to its anchors and their neighbours only.

    The anchors p_1..p_K are the K items with the largest `e_C . e_i`, and item j has the weight
    `M_j = max_k exp(-(j - p_k)^2 / (2 sigma^2))`. The selection has no gradient.

    Args:
        top_k: K, the number of anchors of a candidate.
        sigma: width of the Gaussian, in positions of the history.
        eps: items of smaller weight are dropped.
        recent: the number of most recent visible items that are kept with weight 1 beside the
            anchors; 0 in the paper.
        layout: "per_candidate" or "shared_history", see `AttentionHook`; "auto" takes the one that
            has fewer rows by the bounds that the host gives (`layout_cost.py`). The two are
            different models, so the choice is made once and is part of `state_dict`: a checkpoint
            restores it. Until a host decides, "auto" is "per_candidate".
        mask_position: "post" or "pre", see `AttentionHook`.
        table: the embeddings that score: "live", those of the item table, or "frozen", a copy of
            it taken by `freeze`.
        score: "dot", the paper's `e_C . e_i`, or "cosine", the same of embeddings of length 1. The
            norms of a trained table range over a factor of ten, and a dot product chooses anchors
            of large norm, which are popular items.

    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(
        self,
        *,
        top_k: int = 50,
        sigma: float = 2.0,
        eps: float = 1e-3,
        recent: int = 0,
        layout: Literal["auto", "per_candidate", "shared_history"] = "auto",
        mask_position: MaskPosition = "post",
        table: Table = "live",
        score: Score = "dot",
    ) -> None:
        super().__init__()
        self.settings = PlanSettings(top_k, sigma, eps, recent).check()
        check_choice(("auto", *_CANDIDATE_LAYOUTS), layout=layout)
        check_choice(get_args(MaskPosition), mask_position=mask_position)
        check_choice(get_args(Table), table=table)
        check_choice(get_args(Score), score=score)
        if top_k == 0 and recent == 0:
            raise HpgrError("top_k and recent are both 0: nothing of the history would be kept")
        self.layout = "per_candidate" if layout == "auto" else layout
        self._chooses_layout = layout == "auto"
        self.mask_position = mask_position
        self.table = table
        self.score = score
        self.frozen_table: Tensor | None
        self.register_buffer("frozen_table", None)
        self.chosen_layout: Tensor | None  # an index into _CANDIDATE_LAYOUTS
        self.register_buffer("chosen_layout", None)

    def decide_layout(self, *, max_history: int, max_candidates: int) -> None:
        """Choose the layout, if it is "auto" and neither chosen nor restored yet."""
        if not self._chooses_layout or self.chosen_layout is not None:
            return
        rows = layout_rows(max_history, max_candidates, self.settings)
        layout = choose_layout(rows)
        (other,) = rows.keys() - {layout}
        _LOG.info(
            'hpgr.PreferenceGuidedSparseAttention.layout = "auto" is %r: for up to %d items and %d '
            "candidates of a user it has %.2f of the other's rows",
            layout,
            max_history,
            max_candidates,
            rows[layout] / rows[other],
        )
        self._take_layout(layout)

    def restore_layout(self, state_dict: MutableMapping[str, Any], prefix: str) -> None:
        """Take the layout that a checkpoint chose; a bound layout stays as it is.

        Args:
            state_dict: of the checkpoint; gets, or loses, the entry of the layout as this hook has
                one or not.
            prefix: of the hook in it.
        """
        name = prefix + "chosen_layout"
        if not self._chooses_layout:
            state_dict.pop(name, None)
            return
        # A checkpoint from before there was a choice was trained per candidate.
        chosen = state_dict.setdefault(name, torch.tensor(0))
        self._take_layout(_CANDIDATE_LAYOUTS[int(chosen)])

    def _take_layout(self, layout: ChosenLayout) -> None:
        self.layout = layout
        self.chosen_layout = torch.tensor(_CANDIDATE_LAYOUTS.index(layout))

    @torch.no_grad()
    def freeze(self, table_weight: Tensor) -> None:
        """Score with a copy of this item table from now on.

        Args:
            table_weight: `[V, D]`.

        Raises:
            ValueError: the hook scores on the live table, or the table is not 2-d.
        """
        if self.table != "frozen":
            raise ValueError(f"freeze needs table='frozen', this hook has table={self.table!r}")
        if table_weight.dim() != 2:
            raise ValueError(f"table_weight must be [V, D], got {list(table_weight.shape)}")
        self.frozen_table = table_weight.detach().clone()

    def plan(self, inputs: HookInputs) -> PreferencePlan:
        """One row per candidate, see `plan_preferences`; raises as `scored` does."""
        inputs = self.scored(inputs)
        has_times = inputs.candidate_timestamps is not None
        return plan_preferences(
            inputs.history_embeddings,
            inputs.candidate_embeddings,
            inputs.history_offsets,
            inputs.candidate_offsets,
            **self.settings._asdict(),
            history_timestamps=inputs.history_timestamps if has_times else None,
            candidate_timestamps=inputs.candidate_timestamps,
            max_history=inputs.max_history,
            max_candidates=inputs.max_candidates,
        )

    def scored(self, inputs: HookInputs) -> HookInputs:
        """The inputs with the embeddings that choose anchors, by `table` and `score`.

        Raises:
            ValueError: table="frozen" without a copy of the table, or without ids.
        """
        if self.table == "frozen":
            if self.frozen_table is None:
                raise ValueError("table='frozen' needs freeze(table_weight) before the first plan")
            if inputs.history_ids is None or inputs.candidate_ids is None:
                raise ValueError("table='frozen' needs history_ids and candidate_ids, got None")
            inputs = replace(
                inputs,
                history_embeddings=self.frozen_table[inputs.history_ids],
                candidate_embeddings=self.frozen_table[inputs.candidate_ids],
            )
        if self.score == "cosine":
            inputs = replace(
                inputs,
                history_embeddings=_unit(inputs.history_embeddings),
                candidate_embeddings=_unit(inputs.candidate_embeddings),
            )
        return inputs

    def longest_row(self, plan: PreferencePlan, max_history: int) -> int:
        """See `AttentionHook`."""
        longest = super().longest_row(plan, max_history)
        return min(longest, most_kept(self.settings, max_history))

    def extra_repr(self) -> str:
        return (
            f"{', '.join(f'{name}={value}' for name, value in self.settings._asdict().items())}, "
            f"layout={self.layout!r}, mask_position={self.mask_position!r}, table={self.table!r}, "
            f"score={self.score!r}"
        )

    def _load_from_state_dict(
        self, state_dict: MutableMapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        self.restore_layout(state_dict, prefix)
        # The frozen table of a checkpoint is loaded, also where none was frozen before.
        saved = state_dict.get(prefix + "frozen_table")
        if saved is not None and self.table == "frozen" and self.frozen_table is None:
            self.frozen_table = torch.empty_like(saved)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class StochasticLength(AttentionHook):
    """Stochastic length (Eq. 4 of the HSTU paper): long histories are sampled down in training.

    With N_c the bound on the length, a history of `n > N_c^(alpha / 2)` items stays whole with
    probability `N_c^alpha / n^2`; else `floor(N_c^(alpha / 2))` of its items are kept, in their
    order and with weight 1. In evaluation every history stays whole (the plan is None).

    The draws come from a generator of the hook, so they repeat for a seed whatever else is drawn.
    Its state is part of `state_dict`, so a resumed training continues with the same draws.

    Args:
        alpha: in (1, 2]; fewer items are kept the smaller it is.
        selection: which items are kept. "recent": the last ones; "uniform": drawn without
            replacement; "weighted": so drawn with weights `1 - f_i / sum f`, where
            `f_i = t_n - t_i` is the age of an item.
        max_history: N_c, items; None takes the longest history of each batch.
        seed: of the generator.

    Raises:
        ValueError: an argument out of its range.
    """

    layout = "per_user"

    def __init__(
        self,
        *,
        alpha: float,
        selection: Selection = "weighted",
        max_history: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 1.0 < alpha <= 2.0:
            raise HpgrError(f"alpha must be in (1, 2], got {alpha}")
        check_choice(get_args(Selection), selection=selection)
        if max_history is not None:
            check_at_least(1, max_history=max_history)
        check_at_least(0, seed=seed)
        self.alpha = alpha
        self.selection = selection
        self.max_history = max_history
        self._generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def plan(self, inputs: HookInputs) -> PreferencePlan | None:
        """One row per user; None in evaluation.

        Raises:
            ValueError: selection="weighted" without `history_timestamps`.
        """
        if not self.training:
            return None
        if self.selection == "weighted" and inputs.history_timestamps is None:
            raise ValueError("selection='weighted' needs history_timestamps, got None")
        lengths = inputs.history_offsets.long().diff()
        longest = inputs.max_history
        if longest is None:
            longest = max(lengths.tolist(), default=0)
        kept_lengths = self._kept_lengths(lengths, longest)
        index = _largest(self._priority(inputs), inputs.history_offsets, kept_lengths, longest)
        dtype = torch.promote_types(inputs.history_embeddings.dtype, torch.float32)
        weights = index.new_ones(len(index), dtype=dtype)
        return PreferencePlan(index, weights, complete_cumsum(kept_lengths))

    def _kept_lengths(self, lengths: Tensor, longest: int) -> Tensor:
        """How many items each history keeps in this draw, `[B]`."""
        bound = longest if self.max_history is None else self.max_history
        # A whole power may come out just below: 64^(2/3) is 15.999... in floats.
        short = math.floor(bound ** (self.alpha / 2.0) + 1e-9)
        whole_probability = bound**self.alpha / lengths.double().square()
        whole = self._uniform(lengths) < whole_probability
        return torch.where(whole | (lengths <= short), lengths, short)

    def _priority(self, inputs: HookInputs) -> Tensor:
        """One number for each history item, `[T]`: the items with the largest are kept."""
        offsets, timestamps = inputs.history_offsets, inputs.history_timestamps
        total = len(inputs.history_embeddings)
        if self.selection == "recent":
            return torch.arange(total, device=offsets.device, dtype=torch.float64)
        # Gumbel's trick: the m largest of log w + noise are m draws without replacement.
        gumbel = -(-self._uniform(offsets.new_empty(total)).log()).log()
        if timestamps is None or self.selection == "uniform":
            return gumbel
        return gumbel + _recency_weights(offsets, timestamps).log()

    def _uniform(self, like: Tensor) -> Tensor:
        """Draws in (0, 1) in the shape of `like`; made on the CPU: the same on every device."""
        draws = torch.rand(like.shape, generator=self._generator, dtype=torch.float64)
        return draws.clamp(min=torch.finfo(torch.float64).tiny).to(like.device)

    def get_extra_state(self) -> Tensor:
        return self._generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        self._generator.set_state(state.cpu())

    def extra_repr(self) -> str:
        return (
            f"alpha={self.alpha}, selection={self.selection!r}, max_history={self.max_history}, "
            f"layout={self.layout!r}"
        )


def _unit(embeddings: Tensor) -> Tensor:
    """Rows of length 1, in float32 at least: half precision would make ties of near scores."""
    dtype = torch.promote_types(embeddings.dtype, torch.float32)
    return F.normalize(embeddings.to(dtype), dim=1)


def _recency_weights(offsets: Tensor, timestamps: Tensor) -> Tensor:
    """`1 - f_i / sum f` with ages `f_i = t_n - t_i`, `[T]`; 1 where all ages are 0."""
    ids = segment_ids(offsets, len(timestamps))
    last = offsets[1:].long()[ids] - 1
    age = (timestamps[last] - timestamps).double()
    total = age.new_zeros(len(offsets) - 1).index_add(0, ids, age)[ids]
    return torch.where(total > 0, 1.0 - age / total.clamp(min=1.0), 1.0)


def _largest(priority: Tensor, offsets: Tensor, counts: Tensor, longest: int) -> Tensor:
    """Flat index of the `counts[b]` items of largest priority in each row b, ascending."""
    padded = jagged_to_padded_dense(priority, offsets, longest, -math.inf)
    order = padded.argsort(dim=1, descending=True, stable=True)
    taken = torch.arange(longest, device=order.device) < counts.unsqueeze(1)
    keep = torch.zeros_like(taken).scatter(1, order, taken)
    row, place = keep.nonzero(as_tuple=True)
    return offsets.long()[row] + place
