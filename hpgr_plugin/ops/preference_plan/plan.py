"""What a plan is made from, what it is, and the weight by distance to an anchor (Eq. 5)."""

from __future__ import annotations

import functools
import math
from dataclasses import KW_ONLY, dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from hpgr_plugin.errors import HpgrError


class PreferencePlan(NamedTuple):
    """A CSR matrix, rows (candidates, or users) by history items.

    Attributes:
        index: `[P]` int64, rows of the flat history kept for each row, ascending in a row.
        weights: `[P]` float32 (float64 where the embeddings are float64), M_j in [eps, 1].
        offsets: `[R + 1]` int64; row r owns `index[offsets[r]:offsets[r + 1]]`.
    """

    index: Tensor  # type: ignore[assignment]  # a tuple has an index method too
    weights: Tensor
    offsets: Tensor

    def longest(self) -> int:
        """The most items of a row; the device is asked for it."""
        return int(self.offsets.diff().max()) if self.offsets.numel() > 1 else 0


class Selection(NamedTuple):
    """A plan in tensors of a fixed size: rows from `offsets[-1]` on are unspecified.

    With candidates, every candidate's row follows its kept items: a sequence to attend over.

    Attributes:
        index: `[R]` int32 (int64 where T + C needs it), rows of the flat history; candidate c is
            T + c.
        weights: `[R]` float32, M_j; 1 for a candidate.
        offsets: `[C + 1]` int64.
        max_length: an upper bound of the rows of one candidate.
    """

    index: Tensor  # type: ignore[assignment]  # a tuple has an index method too
    weights: Tensor
    offsets: Tensor
    max_length: int


class PlanSettings(NamedTuple):
    """How items are selected and weighted: the arguments of `plan_preferences`."""

    top_k: int = 50
    sigma: float = 2.0
    eps: float = 1e-3
    recent: int = 0

    def check(self) -> PlanSettings:
        """Return the settings.

        Raises:
            ValueError: naming the first setting out of its range.
        """
        for name, value in (("top_k", self.top_k), ("recent", self.recent)):
            if value < 0 or value != int(value):
                raise HpgrError(f"{name} must be an integer of at least 0, got {value}")
        if not (0.0 < self.sigma < math.inf):
            raise HpgrError(f"sigma must be a finite number above 0, got {self.sigma}")
        if not 0.0 < self.eps <= 1.0:
            raise HpgrError(f"eps must be in (0, 1], got {self.eps}")
        return self


class PlanTimes(NamedTuple):
    """The arguments of `count_earlier`, with both bounds.

    Attributes:
        history: `[T]` times, ascending in each history.
        history_offsets: `[B + 1]`.
        candidates: `[C]` times, in the same unit.
        candidate_offsets: `[B + 1]`.
        max_history: the most items of a user, or more.
        max_candidates: the most candidates of a user, or more.
    """

    history: Tensor
    history_offsets: Tensor
    candidates: Tensor
    candidate_offsets: Tensor
    max_history: int
    max_candidates: int


@dataclass(frozen=True)
class PlanInputs:
    """Histories and candidates of B users: the arguments of `plan_preferences`, and two bounds.

    Attributes:
        max_history: an upper bound of the items per user; None until `check` has counted them.
        max_candidates: an upper bound of the candidates per user, likewise.
    """

    history_embeddings: Tensor
    candidate_embeddings: Tensor
    history_offsets: Tensor
    candidate_offsets: Tensor
    history_timestamps: Tensor | None = None
    candidate_timestamps: Tensor | None = None
    _: KW_ONLY
    max_history: int | None = None
    max_candidates: int | None = None

    def check(self) -> PlanInputs:
        """Return the inputs with their bounds; where they lack one, after one wait for the device.

        With both bounds given, only shapes are checked: reading the offsets would be a wait.

        Raises:
            ValueError: naming the first argument that does not fit the others.
        """
        history, candidates = self.history_embeddings, self.candidate_embeddings
        if history.dim() != 2 or candidates.dim() != 2 or history.shape[1] != candidates.shape[1]:
            raise ValueError(
                "history_embeddings [T, D] and candidate_embeddings [C, D] must share D, got "
                f"{list(history.shape)} and {list(candidates.shape)}"
            )
        self._check_timestamps()
        self._check_shapes_of_offsets()
        if self.max_history is not None and self.max_candidates is not None:
            return self
        max_history, max_candidates = self._check_offsets()
        return replace(self, max_history=max_history, max_candidates=max_candidates)

    def _check_timestamps(self) -> None:
        if (self.history_timestamps is None) != (self.candidate_timestamps is None):
            missing = "history" if self.history_timestamps is None else "candidate"
            raise ValueError(
                "history_timestamps and candidate_timestamps must both be given or both be None, "
                f"but {missing}_timestamps is None and the other is not"
            )
        for name, times, rows in (
            ("history_timestamps", self.history_timestamps, self.history_embeddings),
            ("candidate_timestamps", self.candidate_timestamps, self.candidate_embeddings),
        ):
            if times is not None and times.shape != (len(rows),):
                raise ValueError(f"{name} must have shape [{len(rows)}], got {list(times.shape)}")

    def _check_shapes_of_offsets(self) -> None:
        history_offsets, candidate_offsets = self.history_offsets, self.candidate_offsets
        if history_offsets.shape != candidate_offsets.shape or history_offsets.dim() != 1:
            raise ValueError(
                "history_offsets and candidate_offsets must both be [B + 1], got "
                f"{list(history_offsets.shape)} and {list(candidate_offsets.shape)}"
            )
        if history_offsets.numel() == 0:
            raise ValueError("history_offsets must be [B + 1] with B >= 0, got no element")

    def _check_offsets(self) -> tuple[int, int]:
        """The most items, and the most candidates, of one user."""
        history_offsets, candidate_offsets = self.history_offsets, self.candidate_offsets
        both = torch.stack([history_offsets.long(), candidate_offsets.long()]).tolist()
        longest = []
        for name, offsets, rows in (
            ("history_offsets", both[0], self.history_embeddings),
            ("candidate_offsets", both[1], self.candidate_embeddings),
        ):
            lengths = [end - start for start, end in pairwise(offsets)]
            longest.append(max(lengths, default=0))
            if offsets[0] != 0 or offsets[-1] != len(rows) or min(lengths, default=0) < 0:
                raise ValueError(
                    f"{name} must ascend from 0 to the number of rows, {len(rows)}, got {offsets}"
                )
        return longest[0], longest[1]


@functools.lru_cache(maxsize=64)
def most_kept(settings: PlanSettings, max_history: int) -> int:
    """An upper bound of the items that one candidate keeps."""
    radius = len(gaussian_kernel(settings.sigma, settings.eps, max_history)) - 1
    return min(max_history, settings.top_k * (2 * radius + 1) + settings.recent)


def kernel_length(sigma: float, eps: float) -> int:
    """From this length of a history on, `gaussian_kernel` does not depend on it."""
    return math.ceil(sigma * math.sqrt(-2.0 * math.log(eps))) + 1


def gaussian_kernel(sigma: float, eps: float, longest: int) -> Tensor:
    """M by distance: `exp(-d^2 / (2 sigma^2))` for d = 0, 1, ... while it is at least eps.

    Args:
        sigma: width in positions.
        eps: smallest weight.
        longest: an upper bound of the history lengths.

    Returns:
        `[radius + 1]` float64, radius < max(1, longest).
    """
    radius = min(max(0, longest - 1), kernel_length(sigma, eps) - 1)
    distance = torch.arange(radius + 1, dtype=torch.float64)
    kernel = torch.exp(-distance.square() / (2.0 * sigma**2))
    return kernel[kernel >= eps]
