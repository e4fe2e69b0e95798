"""Checks of the times in the first batches, which the host's readers do not always provide."""

from dataclasses import dataclass

from torch import Tensor

from hpgr_plugin.components.positions import VisibilityCheck
from hpgr_plugin.components.sessions import check_time_unit
from hpgr_plugin.errors import HpgrError
from hpgr_plugin.hosts.dlrm_v3.features import Features
from hpgr_plugin.hosts.dlrm_v3.selection import RankingBatch
from hpgr_plugin.ops.jagged import check_sorted, segment_ids
from hpgr_plugin.ops.preference_plan import count_earlier

_BATCHES = 10  # the first ones


@dataclass
class TimesCheck:
    """Checks the first batches; where it costs no wait for the device, the order of all of them.

    Attributes:
        features: Of the host's configuration.
        owner: The gin name of the model.
        ticks_per_second: Units of the timestamps in a second.
        hides_future: Whether history at or after a candidate's time is hidden from it.
        max_blind_share: Of the candidates that have a history, the share that may see nothing.
    """

    features: Features
    owner: str
    ticks_per_second: int
    hides_future: bool
    max_blind_share: float

    def __post_init__(self) -> None:
        self._unchecked = _BATCHES
        self._visibility = VisibilityCheck(
            times=f"the feature {self.features.query_time!r}",
            binding=f"{self.owner}.hide_future = False",
            max_blind_share=self.max_blind_share,
            batches=_BATCHES,
        )

    def __call__(self, batch: RankingBatch, *, needs_order: bool, gap_seconds: int | None) -> None:
        """Check one batch; warns if its times do not look like seconds, as milliseconds do not.

        Args:
            batch: As looked up.
            needs_order: Whether a slot needs every history in order.
            gap_seconds: The session gap of SEM; None without one.

        Raises:
            HpgrError: A history is out of order although a slot needs its order, or too many
                candidates see nothing of their history.
        """
        first = self._unchecked
        self._unchecked = max(0, first - 1)
        times, query_times = self.features.times(batch)
        offsets = batch.history_offsets
        if needs_order and (first or not times.is_cuda):
            self._check_order(times, offsets)
        if first == _BATCHES and gap_seconds is not None:
            seconds = times // self.ticks_per_second
            check_time_unit(seconds, offsets, gap_seconds, f"{self.owner}.time_unit")
        if first and self.hides_future:
            candidates = batch.candidate_offsets
            visible = count_earlier(
                times,
                offsets,
                query_times,
                candidates,
                max_history=batch.max_uih_len,
                max_candidates=batch.max_num_candidates,
            )
            users = segment_ids(candidates, len(query_times))
            self._visibility(visible, offsets.diff()[users])

    def _check_order(self, times: Tensor, offsets: Tensor) -> None:
        name = self.features.time
        try:
            check_sorted(times, offsets, name)
        except ValueError as error:
            raise HpgrError(
                f"{error}. The slots sem and positional_encoder need histories in order of "
                f"{name!r}, and the reader of this data set does not give them so (the host's "
                "debug data set is random): sort every history, or leave these slots empty"
            ) from error
