"""Which requests go into which batch: shuffled, of similar length, sharded, resumable."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import numpy as np

from hpgr_plugin.data.batch import Batch, tensor
from hpgr_plugin.data.events import require
from hpgr_plugin.data.log import PreparedData, concatenated_ranges, offsets_of
from hpgr_plugin.data.requests import RequestSettings, build_requests
from hpgr_plugin.errors import HpgrError

_Item = TypeVar("_Item")
_Prepared = TypeVar("_Prepared")
# Lengths are sorted inside windows of this many batches: similar lengths meet, still by chance.
_BATCHES_PER_WINDOW = 32


class Loader(ABC, Generic[_Item]):
    """Batches of R examples of given lengths.

    `batches(epoch, start)` repeats exactly: the same epoch gives the same batches, and `start`
    skips the first ones without gathering them, which is how a run resumes.

    Args:
        lengths: [R] tokens of each example.
        batch_tokens: most tokens of a batch; a longer example is a batch of its own.
        max_batch_size: most examples of a batch. None: no limit.
        shuffle: a new order each epoch, by (seed, epoch). False: by length, always the same.
        seed: of the shuffling.
        rank, world_size: this process takes every world_size-th batch. Shuffled, all ranks get
            the same number, and up to world_size - 1 batches are left out of an epoch. Not
            shuffled, none is left out, and the first ranks may get one batch more.
        prefetch: batches gathered ahead by a thread; 0: none.
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
        prefetch: int = 2,
    ) -> None:
        name = type(self).__name__
        require(batch_tokens >= 1, f"{name}.batch_tokens", "1 or more", batch_tokens)
        require(seed >= 0, f"{name}.seed", "0 or more", seed)
        require(prefetch >= 0, f"{name}.prefetch", "0 or more", prefetch)
        require(0 <= rank < world_size, f"{name}.rank", f"0 to {world_size - 1}", rank)
        self._lengths = lengths
        self._batch_tokens = batch_tokens
        self._max_batch_size = max_batch_size or max(1, len(lengths))
        self._shuffle = shuffle
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._prefetch = prefetch

    @abstractmethod
    def gather(self, places: np.ndarray) -> _Item:
        """The batch of the examples at these places, int64 [B]."""

    def num_batches(self, epoch: int = 0) -> int:
        """Batches of this rank in the epoch; differs slightly between epochs."""
        return len(self._plan(epoch))

    def batches(self, epoch: int = 0, start: int = 0) -> Iterator[_Item]:
        """The batches of the epoch from number `start` on, some of them gathered ahead."""
        return self.map_batches(lambda batch, _: batch, epoch, start)

    def map_batches(
        self, prepare: Callable[[_Item, int], _Prepared], epoch: int = 0, start: int = 0
    ) -> Iterator[_Prepared]:
        """What `prepare(batch, number in the epoch)` makes of the batches, in their order.

        It runs where the batches are gathered, ahead of their use.
        """
        plan = self._plan(epoch)[start:]

        def make(number: int, places: np.ndarray) -> _Prepared:
            return prepare(self.gather(places), number)

        if not self._prefetch:
            yield from map(make, range(start, start + len(plan)), plan)
            return
        waiting: deque[Future[_Prepared]] = deque()
        with ThreadPoolExecutor(max_workers=1) as executor:
            try:
                for number, places in enumerate(plan, start):
                    waiting.append(executor.submit(make, number, places))
                    if len(waiting) > self._prefetch:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()

    def _plan(self, epoch: int) -> list[np.ndarray]:
        """The batches of this rank: places of examples, int64 each."""
        if not self._shuffle:
            whole = self._cut(np.argsort(self._lengths, kind="stable"))
            return whole[self._rank :: self._world_size]
        random = np.random.default_rng([self._seed, epoch])
        order = random.permutation(len(self._lengths))
        mean = max(1.0, float(self._lengths.mean())) if len(order) else 1.0
        batch_size = min(self._batch_tokens / mean, self._max_batch_size)
        window = np.arange(len(order)) // max(1, int(batch_size * _BATCHES_PER_WINDOW))
        order = order[np.lexsort((self._lengths[order], window))]
        batches = self._cut(order)
        shares = len(batches) // self._world_size
        if len(batches) and not shares:
            raise HpgrError(
                f"{len(batches)} batches for world_size={self._world_size}: take a smaller "
                f"hpgr.{type(self).__name__}.batch_tokens or fewer processes"
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


class RequestLoader(Loader[Batch]):
    """Batches of the requests of one split.

    Args:
        prepared: the data.
        split: "train" (shuffled by epoch) | "validation" | "test" (every request once over
            all ranks, those of similar length together).
        settings: how candidates are grouped into requests.
        statistics: give the candidates their CandidateStatistics.
        batch_tokens: most tokens of a batch, history and candidates together.
        max_batch_requests: most requests of a batch. None: no limit.
        seed, rank, world_size, prefetch: see Loader.
    """

    def __init__(
        self,
        *,
        prepared: PreparedData,
        split: str,
        settings: RequestSettings,
        statistics: bool = False,
        batch_tokens: int = 16384,
        max_batch_requests: int | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        prefetch: int = 2,
    ) -> None:
        self.prepared = prepared
        self.split = split
        self.statistics = prepared.statistics._asdict() if statistics else {}
        self.requests = build_requests(prepared, split, settings)
        most = max_batch_requests
        require(most is None or most >= 1, "RequestLoader.max_batch_requests", "1 or more", most)
        super().__init__(
            self.requests.history_count + self.requests.candidate_count,
            batch_tokens=batch_tokens,
            max_batch_size=most,
            shuffle=split == "train",
            seed=seed,
            rank=rank,
            world_size=world_size,
            prefetch=prefetch,
        )

    def candidate_rows(self, epoch: int = 0) -> np.ndarray:
        """Rows of the log that the epoch's batches rank, in their order: int64 [C]."""
        places = [*self._plan(epoch), np.zeros(0, dtype=np.int64)]
        return self.requests.take(np.concatenate(places)).all_candidate_rows()

    def gather(self, places: np.ndarray) -> Batch:
        """The batch of the requests at these places, in their order."""
        log, requests = self.prepared.log, self.requests.take(places)
        history = self.prepared.history_rows[
            concatenated_ranges(requests.history_start, requests.history_count)
        ]
        candidates = requests.all_candidate_rows()
        return Batch(
            history_items=tensor(log.item[history]),
            history_timestamps=tensor(log.timestamp[history]),
            history_actions=tensor(log.action[history]),
            history_offsets=tensor(offsets_of(requests.history_count)),
            candidate_items=tensor(log.item[candidates]),
            candidate_timestamps=tensor(log.timestamp[candidates]),
            candidate_labels=tensor(log.label[candidates], np.float32),
            candidate_offsets=tensor(offsets_of(requests.candidate_count)),
            users=tensor(requests.users),
            user_features={
                name: tensor(feature.codes[requests.users])
                for name, feature in log.user_features.items()
            },
            candidate_features={
                name: tensor(column[candidates], np.float32)
                for name, column in self.statistics.items()
            },
            task_labels={
                name: tensor(labels[candidates], np.float32)
                for name, labels in log.task_labels.items()
            },
        )
