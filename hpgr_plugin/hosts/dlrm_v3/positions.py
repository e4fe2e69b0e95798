"""Positional encoders with the host's signature that know the places in the full sequences."""

from typing import Any

import torch
import torch.nn.functional as F
from generative_recommenders.common import HammerKernel, HammerModule
from generative_recommenders.modules.positional_encoder import HSTUPositionalEncoder
from torch import Tensor

from hpgr_plugin.components.positions import TimeAwarePositionalEncoder
from hpgr_plugin.errors import HpgrError
from hpgr_plugin.hosts.dlrm_v3.selection import FullPlaces, RankingBatch
from hpgr_plugin.ops.compact.parts import SequenceParts, sequence_parts
from hpgr_plugin.ops.preference_plan import count_earlier

_SECONDS_PER_STEP = 60.0  # of the square root that the host's time buckets count in


class PlacedHSTUPositionalEncoder(HSTUPositionalEncoder):
    """The host's positional encoder, also for sequences with rows left out.

    Attributes:
        places: Those of the rows of the passes that are running; None: the sequences are whole, and
            the host's own kernel runs.
    """

    places: FullPlaces | None = None

    def forward(self, *, seq_timestamps: Tensor, seq_embeddings: Tensor, **others: Any) -> Tensor:
        """As the host's, `[L, D]` to `[L, D]`."""
        if self.places is None:
            encoded: Tensor = super().forward(
                seq_timestamps=seq_timestamps, seq_embeddings=seq_embeddings, **others
            )
            return encoded
        position = F.embedding(self._positions(self.places), self._position_embeddings_weight)
        time = F.embedding(
            self._time_buckets(self.places, seq_timestamps), self._timestamp_embeddings_weight
        )
        scaled = seq_embeddings * self._embedding_dim**0.5
        return scaled + (position + time).to(scaled.dtype)

    def _positions(self, places: FullPlaces) -> Tensor:
        """Rows of the position table: the distance from the end, after the contextual places."""
        contextual_len, last = (
            places.parts.contextual_len,
            len(self._position_embeddings_weight) - 1,
        )
        history = places.from_end + contextual_len
        return places.of_every_row(
            torch.arange(contextual_len, device=history.device),
            history.clamp(max=last),
            history.new_full((), min(contextual_len, last)),
        )

    def _time_buckets(self, places: FullPlaces, timestamps: Tensor) -> Tensor:
        """Rows of the time table: the square root of the minutes before the last row."""
        table, parts = self._timestamp_embeddings_weight, places.parts
        # The host's PyTorch kernel takes the width of the table for the number of its rows.
        last = table.shape[self.hammer_kernel() == HammerKernel.PYTORCH] - 1
        query = timestamps[(parts.seq_offsets[1:] - 1).clamp(min=0)].repeat_interleave(
            parts.seq_offsets.diff(), output_size=parts.total_rows
        )
        elapsed = (query - timestamps).clamp(min=1e-6) / _SECONDS_PER_STEP
        return elapsed.sqrt().int().clamp(0, last)


class TimeAwareHSTUPositionalEncoder(HammerModule):
    """Time-aware positions (Eq. 4) with the signature of the host's positional encoder.

    As in the host, embeddings are multiplied by sqrt(D) first. Contextual tokens have no time:
    each of their places has a learned row of its own, zero at the start. Every candidate is
    numbered by its own query time.

    Args:
        encoder: `TimeAwarePositionalEncoder` of the transducer's width.
        embedding_dim: D of the transducer.
        contextual_seq_len: Tokens in front of every history.
        is_inference: As in the host's modules.

    Attributes:
        places: Those of the rows of the passes that are running; None: found from the sequences.
    """

    places: FullPlaces | None = None

    def __init__(
        self,
        encoder: TimeAwarePositionalEncoder,
        *,
        embedding_dim: int,
        contextual_seq_len: int,
        is_inference: bool,
    ) -> None:
        super().__init__(is_inference=is_inference)
        self.encoder = encoder
        self.contextual_weight = torch.nn.Parameter(torch.zeros(contextual_seq_len, embedding_dim))

    def forward(
        self,
        *,
        seq_lengths: Tensor,
        seq_offsets: Tensor,
        seq_timestamps: Tensor,
        seq_embeddings: Tensor,
        num_targets: Tensor | None,
        **_: Any,
    ) -> Tensor:
        """Add the positions.

        Args:
            seq_lengths: `[B]`.
            seq_offsets: `[B + 1]`.
            seq_timestamps: `[L]` seconds.
            seq_embeddings: `[L, D]`.
            num_targets: Candidates at the end of each sequence `[B]`, or None.

        Returns:
            `[L, D]`.
        """
        contextual_len, embedding_dim = self.contextual_weight.shape
        places = self.places
        if places is None:
            if num_targets is None:
                num_targets = torch.zeros_like(seq_lengths)
            places = self._places(seq_offsets, num_targets, seq_timestamps)
        assert places.earlier is not None
        history = self.encoder.history_rows(
            places.from_start, places.users, places.earlier, places.parts.candidate_offsets
        )
        rows = places.of_every_row(
            torch.arange(contextual_len, device=seq_offsets.device),
            contextual_len + history,
            contextual_len + places.earlier,
        )
        table = self.encoder.table.weight
        if contextual_len:
            table = torch.cat([self.contextual_weight, table])
        scaled = seq_embeddings * embedding_dim**0.5
        return (scaled + F.embedding(rows, table)).to(scaled.dtype)

    def _places(self, seq_offsets: Tensor, num_targets: Tensor, timestamps: Tensor) -> FullPlaces:
        """Of whole sequences."""
        parts = sequence_parts(
            seq_offsets,
            num_targets,
            contextual_len=len(self.contextual_weight),
            total_rows=len(timestamps),
        )
        earlier = count_earlier(
            timestamps[parts.history_rows()],
            parts.history_offsets,
            timestamps[parts.candidate_rows()],
            parts.candidate_offsets,
        )
        rows = torch.arange(parts.num_history, device=timestamps.device)
        return FullPlaces(parts, rows, parts.history_offsets, earlier)


def batch_places(
    encoder: Any,
    batch: RankingBatch,
    times: tuple[Tensor, Tensor],
    parts: SequenceParts,
    kept_rows: Tensor | None,
) -> FullPlaces | None:
    """Where the rows are in the full sequences; None: the encoder finds it by itself.

    Args:
        encoder: The transducer's positional encoder, or None.
        batch: With its full histories.
        times: Of the history items `[T]` and of the candidates `[C]`.
        parts: Of the sequences that the transducer gets.
        kept_rows: `[P]` rows of the flat histories that are left, or None: all.
    """
    is_time_aware = isinstance(encoder, TimeAwareHSTUPositionalEncoder)
    if kept_rows is None and not is_time_aware:
        return None
    offsets = batch.history_offsets.long()
    device = times[0].device
    rows = torch.arange(len(times[0]), device=device) if kept_rows is None else kept_rows
    if not is_time_aware:
        return FullPlaces(parts, rows, offsets)
    table = encoder.encoder
    shared = not table.hide_future and batch.max_num_candidates > 1
    if shared or batch.max_uih_len + 1 > (table.max_positions or 0):
        table.check_lengths(offsets, batch.candidate_offsets)
    earlier = count_earlier(
        times[0],
        offsets,
        times[1],
        batch.candidate_offsets,
        max_history=batch.max_uih_len,
        max_candidates=batch.max_num_candidates,
    )
    return FullPlaces(parts, rows, offsets, earlier)


def set_places(encoder: Any, places: FullPlaces | None) -> None:
    """Tell a positional encoder the places of the rows in the coming passes; None: no longer.

    Raises:
        HpgrError: The encoder is of a kind that numbers whole sequences only.
    """
    if isinstance(encoder, PlacedHSTUPositionalEncoder | TimeAwareHSTUPositionalEncoder):
        encoder.places = places
    elif encoder is not None and places is not None:
        raise HpgrError(
            f"a positional encoder of class {type(encoder).__name__} numbers whole histories, and "
            "hpgr.DlrmHSTU.attention_hook shortens them: leave the host's encoder in its place, "
            'fill hpgr.DlrmHSTU.positional_encoder, or take layout="shared_history"'
        )
