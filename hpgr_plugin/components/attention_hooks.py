"""What fills the `attention_hook` slot: preference-guided sparse attention, or stochastic length.

A hook only plans. The host gathers the kept rows (layouts "per_candidate" and "per_user") or
weighs the candidate's row (layout "shared_history"); it reads the plan, `layout` and
`mask_position`, nothing else.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import gin
import torch
from torch import Tensor, nn

from hpgr_plugin.ops.jagged import jagged_to_padded_dense, segment_ids
from hpgr_plugin.ops.preference_plan import PlanSettings, PreferencePlan, plan_preferences

Layout = Literal["per_candidate", "shared_history", "per_user"]
MaskPosition = Literal["post", "pre"]
Table = Literal["live", "frozen"]
Selection = Literal["weighted", "recent", "uniform"]


class AttentionHook(nn.Module):
    """The one interface of the `attention_hook` slot.

    Attributes:
        layout: what a row of the plan is, and what the host does with it.
            "per_candidate": a candidate; the pair (user, candidate) is one shortened sequence.
            "shared_history": a candidate; the plan weighs the candidate's row against the history.
            "per_user": a user; the history is shortened once, and shared by all its candidates.
        mask_position: where the weights enter the attention, s being the scores with their bias:
            "post" A' = SiLU(s) * M, "pre" A' = SiLU(M * s).
    """

    layout: Layout = "per_candidate"
    mask_position: MaskPosition = "post"

    def plan(
        self,
        *,
        history_embeddings: Tensor,
        candidate_embeddings: Tensor,
        history_offsets: Tensor,
        candidate_offsets: Tensor,
        history_timestamps: Tensor | None = None,
        candidate_timestamps: Tensor | None = None,
        history_ids: Tensor | None = None,
        candidate_ids: Tensor | None = None,
    ) -> PreferencePlan | None:
        """What is kept of each history; None leaves every history whole.

        Args:
            history_embeddings: `[T, D]`, raw rows of the item table.
            candidate_embeddings: `[C, D]`, raw rows of the item table.
            history_offsets: `[B + 1]`.
            candidate_offsets: `[B + 1]`.
            history_timestamps: `[T]` seconds; with the candidates' given, the future is hidden.
            candidate_timestamps: `[C]` seconds.
            history_ids: `[T]`, rows of the item table.
            candidate_ids: `[C]`, rows of the item table.
        """
        raise NotImplementedError


@gin.configurable(module="hpgr")
class PreferenceGuidedSparseAttention(AttentionHook):
    """PGSA (Eq. 5): anchors by e_C . e_i, a Gaussian around each, the rest dropped.

    No gradient goes through the selection.

    Args:
        top_k: K, number of anchors of a candidate.
        sigma: width of the Gaussian, in positions of the history.
        eps: weights below it are dropped.
        recent: r most recent visible items kept with weight 1 beside the anchors; 0 in the paper.
        layout: "per_candidate" or "shared_history", see `AttentionHook`.
        mask_position: "post" or "pre", see `AttentionHook.mask_position`.
        table: what scores: the "live" item table, or a "frozen" copy taken by `freeze`.

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
        layout: Literal["per_candidate", "shared_history"] = "per_candidate",
        mask_position: MaskPosition = "post",
        table: Table = "live",
    ) -> None:
        super().__init__()
        PlanSettings(top_k, sigma, eps, recent).check()
        _check_choice("layout", layout, ("per_candidate", "shared_history"))
        _check_choice("mask_position", mask_position, get_args(MaskPosition))
        _check_choice("table", table, get_args(Table))
        if top_k == 0 and recent == 0:
            raise ValueError("top_k and recent are both 0: nothing of the history would be kept")
        self.top_k = top_k
        self.sigma = sigma
        self.eps = eps
        self.recent = recent
        self.layout = layout
        self.mask_position = mask_position
        self.table = table
        self.frozen_table: Tensor | None
        self.register_buffer("frozen_table", None)

    @torch.no_grad()
    def freeze(self, table_weight: Tensor) -> None:
        """Take the copy `[V, D]` of the item table that scores from now on.

        Raises:
            ValueError: the hook scores on the live table, or the table is not 2-d.
        """
        if self.table != "frozen":
            raise ValueError(f"freeze needs table='frozen', this hook has table={self.table!r}")
        if table_weight.dim() != 2:
            raise ValueError(f"table_weight must be [V, D], got {list(table_weight.shape)}")
        self.frozen_table = table_weight.detach().clone()

    def plan(
        self,
        *,
        history_embeddings: Tensor,
        candidate_embeddings: Tensor,
        history_offsets: Tensor,
        candidate_offsets: Tensor,
        history_timestamps: Tensor | None = None,
        candidate_timestamps: Tensor | None = None,
        history_ids: Tensor | None = None,
        candidate_ids: Tensor | None = None,
    ) -> PreferencePlan:
        """One row per candidate, see `plan_preferences`.

        Raises:
            ValueError: with table="frozen", there is no copy yet or the ids are missing.
        """
        if self.table == "frozen":
            if self.frozen_table is None:
                raise ValueError("table='frozen' needs freeze(table_weight) before the first plan")
            if history_ids is None or candidate_ids is None:
                raise ValueError("table='frozen' needs history_ids and candidate_ids, got None")
            history_embeddings = self.frozen_table[history_ids]
            candidate_embeddings = self.frozen_table[candidate_ids]
        return plan_preferences(
            history_embeddings,
            candidate_embeddings,
            history_offsets,
            candidate_offsets,
            top_k=self.top_k,
            sigma=self.sigma,
            eps=self.eps,
            recent=self.recent,
            # without the candidates' times nothing is hidden
            history_timestamps=None if candidate_timestamps is None else history_timestamps,
            candidate_timestamps=candidate_timestamps,
        )

    def extra_repr(self) -> str:
        return (
            f"top_k={self.top_k}, sigma={self.sigma}, eps={self.eps}, recent={self.recent}, "
            f"layout={self.layout!r}, mask_position={self.mask_position!r}, table={self.table!r}"
        )

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # A checkpoint brings its frozen table along, also where none was frozen before.
        saved = state_dict.get(prefix + "frozen_table")
        if saved is not None and self.table == "frozen" and self.frozen_table is None:
            self.frozen_table = torch.empty_like(saved)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


@gin.configurable(module="hpgr")
class StochasticLength(AttentionHook):
    """Stochastic length (HSTU, Eq. 4): in training, long histories are sampled down.

    With N_c the bound on the length, a history of n > N_c^(alpha / 2) items stays whole with
    probability N_c^alpha / n^2, else floor(N_c^(alpha / 2)) of its items are kept, in their
    order and with weight 1. In evaluation every history stays whole (the plan is None).

    Draws come from an own generator, so they repeat for a seed whatever else is drawn; its state
    is part of `state_dict`, so a resumed training goes on with the same draws.

    Args:
        alpha: in (1, 2]; the smaller, the sparser.
        selection: which items are kept. "recent": the last ones; "uniform": any, without
            replacement; "weighted": the same with weights 1 - f_i / sum f, f_i = t_n - t_i the
            age of the item.
        max_history: N_c; None takes the longest history of each batch.
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
            raise ValueError(f"alpha must be in (1, 2], got {alpha}")
        _check_choice("selection", selection, get_args(Selection))
        if max_history is not None and max_history < 1:
            raise ValueError(f"max_history must be at least 1 or None, got {max_history}")
        self.alpha = alpha
        self.selection = selection
        self.max_history = max_history
        self._generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def plan(
        self,
        *,
        history_embeddings: Tensor,
        candidate_embeddings: Tensor,
        history_offsets: Tensor,
        candidate_offsets: Tensor,
        history_timestamps: Tensor | None = None,
        candidate_timestamps: Tensor | None = None,
        history_ids: Tensor | None = None,
        candidate_ids: Tensor | None = None,
    ) -> PreferencePlan | None:
        """One row per user; None in evaluation.

        Raises:
            ValueError: selection is "weighted" and there are no `history_timestamps`.
        """
        if not self.training:
            return None
        if self.selection == "weighted" and history_timestamps is None:
            raise ValueError("selection='weighted' needs history_timestamps, got None")
        lengths = history_offsets.long().diff()
        kept_lengths = self._kept_lengths(lengths)
        priority = self._priority(history_offsets, history_timestamps, len(history_embeddings))
        index = _largest(priority, history_offsets, kept_lengths)
        dtype = torch.promote_types(history_embeddings.dtype, torch.float32)
        offsets = nn.functional.pad(kept_lengths.cumsum(0), (1, 0))
        return PreferencePlan(index, index.new_ones(len(index), dtype=dtype), offsets)

    def _kept_lengths(self, lengths: Tensor) -> Tensor:
        """How many items each history keeps in this draw, `[B]`."""
        bound = self.max_history
        if bound is None:
            bound = max(lengths.tolist(), default=0)
        # A whole power may come out a rounding error short: 64^(2/3) is 15.999... in floats.
        short = math.floor(bound ** (self.alpha / 2.0) + 1e-9)
        whole_probability = bound**self.alpha / lengths.double().square()
        whole = self._uniform(lengths) < whole_probability
        return torch.where(whole | (lengths <= short), lengths, short)

    def _priority(self, offsets: Tensor, timestamps: Tensor | None, total: int) -> Tensor:
        """A number per history item, `[T]`: the items with the largest are kept."""
        if self.selection == "recent":
            return torch.arange(total, device=offsets.device, dtype=torch.float64)
        # Gumbel's trick: the m largest of log w + noise are m draws without replacement.
        gumbel = -(-self._uniform(offsets.new_empty(total)).log()).log()
        if timestamps is None or self.selection == "uniform":
            return gumbel
        return gumbel + _recency_weights(offsets, timestamps).log()

    def _uniform(self, like: Tensor) -> Tensor:
        """Draws in (0, 1) in the shape of `like`, drawn on the CPU: the same on every device."""
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


def _recency_weights(offsets: Tensor, timestamps: Tensor) -> Tensor:
    """1 - f_i / sum f, f_i = t_n - t_i the age of an item, `[T]`; all 1 where nothing has aged."""
    ids = segment_ids(offsets, len(timestamps))
    last = offsets[1:].long()[ids] - 1
    age = (timestamps[last] - timestamps).double()
    total = age.new_zeros(len(offsets) - 1).index_add(0, ids, age)[ids]
    return torch.where(total > 0, 1.0 - age / total.clamp(min=1.0), 1.0)


def _largest(priority: Tensor, offsets: Tensor, counts: Tensor) -> Tensor:
    """Flat index of the counts[b] rows with the largest priority in each row, ascending."""
    longest = max(offsets.diff().tolist(), default=0)
    padded = jagged_to_padded_dense(priority, offsets, longest, -math.inf)
    order = padded.argsort(dim=1, descending=True, stable=True)
    taken = torch.arange(longest, device=order.device) < counts.unsqueeze(1)
    keep = torch.zeros_like(taken).scatter(1, order, taken)
    row, place = keep.nonzero(as_tuple=True)
    return offsets.long()[row] + place


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
