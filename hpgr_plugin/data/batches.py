"""Which requests or sequences go into which batch: shuffled, of like length, sharded, resumable."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from hpgr_plugin.data.batch import Batch
from hpgr_plugin.data.gather import gather_batch
from hpgr_plugin.data.prepared import PreparedData
from hpgr_plugin.data.requests import RequestSettings, build_requests

_Item = TypeVar("_Item")
# Lengths are sorted inside windows of so many batches: like lengths meet, and still by chance.
_BATCHES_A_WINDOW = 32


class BatchPlan:
    """Cuts R examples of given lengths into batches.

    Args:
        lengths: [R] tokens of each example.
        batch_tokens: most tokens of a batch; a longer example is a batch of its own.
        max_batch_size: most examples of a batch. None: no limit.
        shuffle: a new order each epoch, by (seed, epoch). False: by length, always the same.
        seed: of the shuffling.
        rank, world_size: this process takes every world_size-th batch. Shuffled, all ranks
            get the same number, and up to world_size - 1 batches sit an epoch out. Not
            shuffled, none is left out, and the first ranks may get one batch more.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        *,
        batch_tokens: int,
        max_batch_size: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_tokens < 1 or (max_batch_size is not None and max_batch_size < 1):
            raise ValueError(
                "batch_tokens and max_batch_size are 1 or more, "
                f"got {batch_tokens} and {max_batch_size}"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank lies in [0, world_size={world_size}), got {rank}")
        self._lengths = lengths
        self._batch_tokens = batch_tokens
        self._max_batch_size = max_batch_size or max(1, len(lengths))
        self._shuffle = shuffle
        self._seed = seed
        self._rank = rank
        self._world_size = world_size

    def batches(self, epoch: int) -> list[np.ndarray]:
        """The batches of this rank: places of examples, int64 each."""
        if not self._shuffle:
            whole = self._cut(np.argsort(self._lengths, kind="stable"))
            return whole[self._rank :: self._world_size]
        random = np.random.default_rng([self._seed, epoch])
        order = random.permutation(len(self._lengths))
        mean = max(1.0, float(self._lengths.mean())) if len(order) else 1.0
        batch_size = min(self._batch_tokens / mean, self._max_batch_size)
        window = np.arange(len(order)) // max(1, int(batch_size * _BATCHES_A_WINDOW))
        order = order[np.lexsort((self._lengths[order], window))]
        batches = self._cut(order)
        shares = len(batches) // self._world_size
        if len(batches) and not shares:
            raise ValueError(
                f"{len(batches)} batches for world_size={self._world_size}: "
                "take a smaller batch_tokens or fewer processes"
            )
        chosen = random.permutation(len(batches))[: shares * self._world_size]
        return [batches[place] for place in chosen[self._rank :: self._world_size]]

    def _cut(self, order: np.ndarray) -> list[np.ndarray]:
        """The order in pieces within both limits."""
        total = np.cumsum(self._lengths[order])
        batches, start = [], 0
        while start < len(order):
            before = total[start - 1] if start else 0
            end = int(np.searchsorted(total, before + self._batch_tokens, side="right"))
            end = max(start + 1, min(end, start + self._max_batch_size))
            batches.append(order[start:end])
            start = end
        return batches


class RequestLoader:
    """Batches of the requests of one split.

    `batches(epoch, start)` repeats exactly: the same epoch gives the same batches, and `start`
    skips the first ones without gathering them, which is how a run resumes.

    Args:
        prepared: the data.
        split: "train" (shuffled by epoch) | "validation" | "test" (every request once over
            all ranks, those of like length together).
        settings: how candidates are put together into requests.
        batch_tokens: most tokens of a batch, history and candidates together.
        max_batch_requests: most requests of a batch. None: no limit.
        seed: of the shuffling.
        rank, world_size: see BatchPlan.
        prefetch: batches gathered ahead by a thread; 0: none.
    """

    def __init__(
        self,
        *,
        prepared: PreparedData,
        split: str,
        settings: RequestSettings,
        batch_tokens: int = 16384,
        max_batch_requests: int | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        prefetch: int = 2,
    ) -> None:
        self.prepared = prepared
        self.split = split
        self.requests = build_requests(prepared, split, settings)
        self._prefetch = prefetch
        self._plan = BatchPlan(
            self.requests.history_count + self.requests.candidate_count,
            batch_tokens=batch_tokens,
            max_batch_size=max_batch_requests,
            shuffle=split == "train",
            seed=seed,
            rank=rank,
            world_size=world_size,
        )

    def num_batches(self, epoch: int = 0) -> int:
        """Batches of this rank in the epoch; by a few different from epoch to epoch."""
        return len(self._plan.batches(epoch))

    def batches(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """The batches of the epoch from number `start` on."""

        def gather(places: np.ndarray) -> Batch:
            return gather_batch(self.prepared, self.requests.take(places))

        return ahead(self._plan.batches(epoch)[start:], gather, self._prefetch)


def ahead(
    places: list[np.ndarray], gather: Callable[[np.ndarray], _Item], count: int
) -> Iterator[_Item]:
    """gather(p) for each p, in order, `count` of them computed ahead by one thread."""
    if not count:
        yield from map(gather, places)
        return
    waiting: deque[Future[_Item]] = deque()
    with ThreadPoolExecutor(max_workers=1) as executor:
        try:
            for place in places:
                waiting.append(executor.submit(gather, place))
                if len(waiting) > count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
