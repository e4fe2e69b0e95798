"""User sequences for masked item modelling: only training events, cut to a length."""

from __future__ import annotations

import numpy as np

from hpgr_plugin.data.batch import SequenceBatch, tensor
from hpgr_plugin.data.batches import Loader
from hpgr_plugin.data.events import require
from hpgr_plugin.data.log import TRAIN, PreparedData, concatenated_ranges, offsets_of


class SequenceLoader(Loader[SequenceBatch]):
    """Batches of user sequences: the history events of the train split, nothing later.

    A sequence longer than max_length is cut from its recent end: the last chunk is full and
    the oldest may be short. Chunks shorter than min_length are left out.

    Args:
        prepared: the data.
        max_length: most events of a chunk.
        min_length: fewest events of a chunk.
        batch_tokens: most events of a batch.
        users: bool [U], whose sequences; None: everyone's.
        only_positive: leave out the events whose label is 0.
        seed, rank, world_size, prefetch: see Loader.
    """

    def __init__(
        self,
        *,
        prepared: PreparedData,
        max_length: int = 400,
        min_length: int = 2,
        batch_tokens: int = 16384,
        users: np.ndarray | None = None,
        only_positive: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        prefetch: int = 2,
    ) -> None:
        require(max_length >= 1, "SequenceLoader.max_length", "1 or more", max_length)
        require(min_length >= 1, "SequenceLoader.min_length", "1 or more", min_length)
        self.prepared = prepared
        self.min_length = min_length
        self.only_positive = only_positive
        in_train = prepared.is_history & (prepared.split == TRAIN)
        if users is not None:
            in_train &= users[prepared.log.event_users()]
        if only_positive:
            in_train &= prepared.log.label > 0
        self._rows = np.flatnonzero(in_train)
        offsets = offsets_of(in_train)[prepared.log.user_offsets]
        self._users, self._starts, lengths = _chunks(offsets, max_length, min_length)
        super().__init__(
            lengths,
            batch_tokens=batch_tokens,
            seed=seed,
            rank=rank,
            world_size=world_size,
            prefetch=prefetch,
        )

    @property
    def num_sequences(self) -> int:
        """Chunks of all users."""
        return len(self._users)

    def gather(self, places: np.ndarray) -> SequenceBatch:
        """The batch of the chunks at these places, in their order."""
        lengths = self._lengths[places]
        rows = self._rows[concatenated_ranges(self._starts[places], lengths)]
        return SequenceBatch(
            items=tensor(self.prepared.log.item[rows]),
            timestamps=tensor(self.prepared.log.timestamp[rows]),
            actions=tensor(self.prepared.log.action[rows]),
            offsets=tensor(offsets_of(lengths)),
            users=tensor(self._users[places]),
        )


def _chunks(
    offsets: np.ndarray, max_length: int, min_length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """User, start and length of every chunk [S], users ascending and old chunks first."""
    lengths = np.diff(offsets)
    counts = -(-lengths // max_length)
    users = np.repeat(np.arange(len(lengths)), counts)
    from_end = counts[users] - 1 - concatenated_ranges(np.zeros_like(counts), counts)
    end = offsets[1:][users] - from_end * max_length
    start = np.maximum(offsets[:-1][users], end - max_length)
    kept = end - start >= min_length
    return users[kept], start[kept], (end - start)[kept]
