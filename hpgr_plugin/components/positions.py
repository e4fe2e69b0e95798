"""Time-aware positions (Eq. 4): a candidate stands where its time puts it in the history."""

import warnings
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from hpgr_plugin.components.checks import check_at_least, check_choice, check_jagged
from hpgr_plugin.errors import HpgrError
from hpgr_plugin.ops.jagged import check_sorted, ranges, segment_ids, segment_positions
from hpgr_plugin.ops.preference_plan import count_earlier

Form = Literal["absolute", "relative"]


class PositionPlan(NamedTuple):
    """The index arithmetic of positions; planned on the host, it costs a CUDA device no wait.

    Attributes:
        history: int64 `[T]`, rows of the table for history items; None where nothing is added.
        candidates: int64 `[C]`, the same for candidates; None where all have one row, or none.
    """

    history: Tensor | None
    candidates: Tensor | None


def time_aware_index(
    history_timestamps: Tensor,
    history_offsets: Tensor,
    candidate_timestamps: Tensor,
    candidate_offsets: Tensor,
) -> tuple[Tensor, Tensor]:
    """Eq. 4: `Index(C) = 1 + sum_i [t_i < t_C]`; history and candidate are numbered 1..N+1.

    Every candidate is inserted by itself: history items at or after t_C move up by one for it.

    Args:
        history_timestamps: `[T]`, ascending in every history.
        history_offsets: `[B + 1]`.
        candidate_timestamps: `[C]`, in the same unit.
        candidate_offsets: `[B + 1]`.

    Returns:
        `history_index [sum over candidates of N_b]`, the histories candidate after candidate,
        and `candidate_index [C]`, both int64 and counted from 1.

    Raises:
        ValueError: a history out of order (which row), or shapes that do not match.
    """
    times = (history_timestamps, history_offsets, candidate_timestamps, candidate_offsets)
    _check_times(*times)
    earlier = count_earlier(*times)
    users = segment_ids(candidate_offsets, len(candidate_timestamps))
    lengths = history_offsets.long().diff()[users]
    number = 1 + ranges(torch.zeros_like(lengths), lengths)
    earlier_of_pair = earlier.repeat_interleave(lengths, output_size=len(number))
    return number + (number > earlier_of_pair), 1 + earlier


class TimeAwarePositionalEncoder(nn.Module):
    """Time-aware positions (Eq. 4), added to the tokens or left to a bias of the attention.

    "absolute" adds a learned vector for the index. "relative" adds nothing: the host's attention
    has a bias by `Index(C) - Index(j)` for a candidate and `i - j` inside the history. Only
    distances count then, so a candidate later than all of the training, as under a split by time,
    has no row that was never trained.

    All candidates of a user share one history. With `hide_future`, the items that a candidate may
    see (t_i < t_C) have the same numbers for every candidate, so sharing is exact; the host masks
    the items at or after t_C. Without it, those items would need another number for each
    candidate, so every user may have at most one.

    Args:
        embedding_dim: D.
        max_positions: largest index, at least the longest history plus one; the relative form does
            not need it.
        hide_future: whether a candidate's future is masked from it.
        form: "absolute" or "relative".

    Raises:
        HpgrError: an argument out of its range, or no `max_positions` in the absolute form.
    """

    def __init__(
        self,
        *,
        embedding_dim: int,
        max_positions: int | None = None,
        hide_future: bool = True,
        form: Form = "absolute",
    ) -> None:
        super().__init__()
        check_choice(get_args(Form), form=form)
        check_at_least(1, embedding_dim=embedding_dim)
        self.embedding_dim = embedding_dim
        self.max_positions = max_positions
        self.hide_future = hide_future
        self.form = form
        if form == "relative":
            return
        if max_positions is None:
            raise HpgrError(
                "hpgr.TimeAwarePositionalEncoder.max_positions must be bound for "
                "form = 'absolute': it takes the longest history plus one"
            )
        check_at_least(1, max_positions=max_positions)
        self.table = nn.Embedding(max_positions, embedding_dim)  # index 1 is row 0
        nn.init.normal_(self.table.weight, std=0.02)

    def forward(
        self,
        history_embeddings: Tensor,
        history_offsets: Tensor,
        history_timestamps: Tensor,
        candidate_embeddings: Tensor,
        candidate_offsets: Tensor,
        candidate_timestamps: Tensor,
        *,
        plan: PositionPlan | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Histories `[T, D]` and candidates `[C, D]`, in the absolute form with positions added.

        Offsets and times are those of `time_aware_index`; `plan` is of the same requests, and None
        makes it here.

        Raises:
            ValueError: see `plan`.
        """
        if plan is None:
            plan = self.plan(
                history_offsets, history_timestamps, candidate_offsets, candidate_timestamps
            )
        if plan.history is None or plan.candidates is None:
            return history_embeddings, candidate_embeddings
        return (
            history_embeddings + self.table(plan.history),
            candidate_embeddings + self.table(plan.candidates),
        )

    @torch.no_grad()
    def plan(
        self,
        history_offsets: Tensor,
        history_timestamps: Tensor,
        candidate_offsets: Tensor,
        candidate_timestamps: Tensor,
    ) -> PositionPlan:
        """The index arithmetic of `forward`, checked, on the device of its arguments.

        Raises:
            ValueError: a history out of order, a history too long for `max_positions`, several
                candidates of one user without `hide_future`, or shapes that do not match.
        """
        times = (history_timestamps, history_offsets, candidate_timestamps, candidate_offsets)
        _check_times(*times)
        self.check_lengths(history_offsets, candidate_offsets)
        if self.form == "relative":
            return PositionPlan(None, None)
        earlier = count_earlier(*times)
        # Row of the table = index - 1: a place in the history, or the number of earlier items.
        places = segment_positions(history_offsets, len(history_timestamps))
        users = segment_ids(history_offsets, len(places))
        rows = self.history_rows(places, users, earlier, candidate_offsets)
        return PositionPlan(rows, earlier)

    def history_rows(
        self, places: Tensor, users: Tensor, earlier: Tensor, candidate_offsets: Tensor
    ) -> Tensor:
        """Rows of the table for items of histories, also where items are left out, int64 `[P]`.

        Args:
            places: `[P]`, the place of each item in its whole history, from 0.
            users: `[P]`, the user of each item.
            earlier: `[C]`, the number of items before each candidate (`count_earlier`).
            candidate_offsets: `[B + 1]`.
        """
        if self.hide_future:
            return places
        return places + moved_up(places, users, earlier, candidate_offsets)

    def check_lengths(self, history_offsets: Tensor, candidate_offsets: Tensor) -> None:
        """Check that the table has a row for every place; both offsets are `[B + 1]`.

        Raises:
            HpgrError: see `plan`.
        """
        lengths = history_offsets.diff().tolist()
        candidates = candidate_offsets.diff().tolist()
        # A user without a candidate needs no index N + 1.
        needed = max((n + (c > 0) for n, c in zip(lengths, candidates, strict=True)), default=0)
        if self.form == "absolute" and needed > (self.max_positions or 0):
            raise HpgrError(
                f"max_positions is {self.max_positions}, but a history with its candidate "
                f"needs positions up to {needed}"
            )
        if not self.hide_future and max(candidates, default=0) > 1:
            raise HpgrError(
                "hide_future=False numbers a history anew for every candidate, so a shared "
                f"history takes one candidate for each user, got {max(candidates)}; give every "
                "candidate a sequence of its own first"
            )


_ENOUGH_CANDIDATES = 8  # of a first batch, to stop at it


class VisibilityCheck:
    """Finds candidates that see none of their history because of the times in the log.

    With `hide_future` a candidate sees only items with t_i < t_C. In a log whose candidates carry
    no time of their own that is nothing, and a model trains without history and without an error.
    A host calls the check with its first batches, and `finish` where a run may have fewer. A first
    batch in which no candidate sees anything is refused at once.

    Args:
        times: the feature that holds the candidates' times, for the message.
        binding: what switches hiding off, for the message.
        max_blind_share: share of the candidates with history that may see nothing of it.
        batches: how many batches are counted before the verdict.

    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(
        self,
        *,
        times: str = "candidate_timestamps",
        binding: str = "hide_future = False",
        max_blind_share: float = 0.5,
        batches: int = 10,
    ) -> None:
        if not 0.0 <= max_blind_share <= 1.0:
            raise HpgrError(f"max_blind_share must be in [0, 1], got {max_blind_share}")
        check_at_least(1, batches=batches)
        self.times = times
        self.binding = binding
        self.max_blind_share = max_blind_share
        self._batches_left = batches
        self._counts: list[Tensor] = []

    def __call__(self, visible: Tensor, history_lengths: Tensor) -> None:
        """Count one batch; after the last one, give the verdict. Later calls do nothing.

        Args:
            visible: `[C]`, how many history items each candidate sees (`count_earlier`).
            history_lengths: `[C]`, the length of each candidate's history.

        Raises:
            HpgrError: see `finish`.
        """
        if self.done:
            return
        has_history = history_lengths > 0
        blind = has_history & (visible == 0)
        self._counts.append(torch.stack([blind.sum(), has_history.sum()]))  # no wait for the device
        self._batches_left -= 1
        if self._batches_left == 0 or (len(self._counts) == 1 and self._all_blind()):
            self.finish()

    @property
    def done(self) -> bool:
        """Whether the verdict was given, so that calls do nothing."""
        return self._batches_left == 0

    def _all_blind(self) -> bool:
        """Whether a first batch of some size leaves no doubt."""
        blind, candidates = self._counts[0].tolist()
        return bool(candidates >= _ENOUGH_CANDIDATES and blind == candidates)

    def finish(self) -> None:
        """The verdict on the batches so far: a warning where some candidates see nothing.

        Raises:
            HpgrError: more than `max_blind_share` of them see nothing.
        """
        self._batches_left = 0
        if not self._counts:
            return
        blind, candidates = torch.stack(self._counts).sum(0).tolist()
        self._counts.clear()
        if blind == 0:
            return
        message = (
            f"{blind} of {candidates} candidates ({blind / candidates:.0%}) have a history but see "
            f"none of it: by {self.times} all of it happened at or after their own time"
        )
        if blind > self.max_blind_share * candidates:
            raise HpgrError(f"{message}. For a log without times of requests, set {self.binding}")
        warnings.warn(message, stacklevel=2)


def moved_up(places: Tensor, users: Tensor, earlier: Tensor, candidate_offsets: Tensor) -> Tensor:
    """1 for items at or after their user's only candidate, else 0, `[P]` int64.

    Args:
        places: `[P]`, the place of each item in its whole history, from 0.
        users: `[P]`, the user of each item.
        earlier: `[C]`, from `count_earlier`.
        candidate_offsets: `[B + 1]`, one candidate per user at most.
    """
    candidate_users = segment_ids(candidate_offsets, len(earlier))
    # A user without a candidate has nothing inserted: no item lies after it.
    nowhere = torch.iinfo(torch.int64).max
    boundary = places.new_full((candidate_offsets.numel() - 1,), nowhere)
    boundary = boundary.index_copy(0, candidate_users, earlier)
    return (places >= boundary[users]).long()


def _check_times(*times: Tensor) -> None:
    """Check what `time_aware_index` takes."""
    history_timestamps, history_offsets, candidate_timestamps, candidate_offsets = times
    if history_offsets.shape != candidate_offsets.shape:
        raise ValueError(
            "history_offsets and candidate_offsets must both be [B + 1], got "
            f"{list(history_offsets.shape)} and {list(candidate_offsets.shape)}"
        )
    check_jagged(history_timestamps, history_offsets, "history_timestamps", "history_offsets")
    check_jagged(
        candidate_timestamps, candidate_offsets, "candidate_timestamps", "candidate_offsets"
    )
    check_sorted(history_timestamps, history_offsets, "history_timestamps")
