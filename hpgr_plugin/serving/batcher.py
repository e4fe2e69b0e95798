"""Requests of many clients scored together: a batch begins with the first and waits a little."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

from hpgr_plugin.serving.requests import EncodedCandidates

Asked = TypeVar("Asked")
Answered = TypeVar("Answered")


class OverloadedError(Exception):
    """More requests wait than the limit allows."""


class StoppingError(Exception):
    """The server is being stopped and takes no more requests."""


@dataclass(frozen=True)
class BatchLimits:
    """How requests are put together.

    Attributes:
        wait_seconds: the longest that the first request of a batch waits for others.
        max_requests: of a batch.
        max_candidates: of a batch; a larger request is a batch of its own.
        max_waiting: requests that may wait; others are refused.
    """

    wait_seconds: float = 0.002
    max_requests: int = 32
    max_candidates: int = 8192
    max_waiting: int = 1024


def count_candidates(request: object) -> int:
    """How much of a batch a request takes: its candidates; a request for a slate is 1."""
    return request.candidates.shape[1] if isinstance(request, EncodedCandidates) else 1


class Batcher(Generic[Asked, Answered]):
    """Scores in one thread of its own, so that the event loop stays free.

    Args:
        score: called with one batch at a time; an answer that is an exception fails its request,
            and no other.
        limits: of a batch.
        observe: told the size of every batch and the seconds that it took.
    """

    def __init__(
        self,
        score: Callable[[Sequence[Asked]], Sequence[Answered | Exception]],
        limits: BatchLimits,
        observe: Callable[[int, float], None] = lambda size, seconds: None,
    ) -> None:
        self._score = score
        self._limits = limits
        self._observe = observe
        self._waiting: asyncio.Queue[tuple[Asked, asyncio.Future[Answered]]]
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="scorer")
        self._worker: asyncio.Task[None] | None = None
        self.stopping = False

    @property
    def num_waiting(self) -> int:
        """Requests that no batch holds yet."""
        return self._waiting.qsize() if self._worker is not None else 0

    def start(self) -> None:
        """Begin; inside a running event loop."""
        self._waiting = asyncio.Queue()
        self._worker = asyncio.create_task(self._work())

    async def stop(self) -> None:
        """Take no more requests, and return when those that wait are answered."""
        self.stopping = True
        if self._worker is not None:
            await self._waiting.join()
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)
        self._thread.shutdown()

    async def score(self, request: Asked) -> Answered:
        """The answer to one request.

        Raises:
            OverloadedError: too many are waiting.
            StoppingError: after `stop`.
            Exception: what `score` raised, or gave as the answer.
        """
        if self.stopping or self._worker is None:
            raise StoppingError
        if self._waiting.qsize() >= self._limits.max_waiting:
            raise OverloadedError
        answer: asyncio.Future[Answered] = asyncio.get_running_loop().create_future()
        self._waiting.put_nowait((request, answer))
        return await answer

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        held: tuple[Asked, asyncio.Future[Answered]] | None = None
        while True:
            batch = [held if held is not None else await self._waiting.get()]
            held = await self._fill(batch)
            live = [(request, answer) for request, answer in batch if not answer.done()]
            start = time.perf_counter()
            try:
                requests = [request for request, _ in live]
                scores = await loop.run_in_executor(self._thread, self._score, requests)
                for (_, answer), one in zip(live, scores, strict=True):
                    if answer.done():
                        continue
                    if isinstance(one, Exception):
                        answer.set_exception(one)
                    else:
                        answer.set_result(one)
            except Exception as error:  # the requests of this batch fail, not the server
                for _, answer in live:
                    if not answer.done():
                        answer.set_exception(error)
            self._observe(len(live), time.perf_counter() - start)
            for _ in batch:
                self._waiting.task_done()

    async def _fill(
        self, batch: list[tuple[Asked, asyncio.Future[Answered]]]
    ) -> tuple[Asked, asyncio.Future[Answered]] | None:
        """Add requests to a batch that has one; return the one that did not fit any more."""
        limits = self._limits
        candidates = count_candidates(batch[0][0])
        end = asyncio.get_running_loop().time() + limits.wait_seconds
        while len(batch) < limits.max_requests and candidates < limits.max_candidates:
            try:
                left = end - asyncio.get_running_loop().time()
                if self._waiting.empty() and left > 0:
                    entry = await asyncio.wait_for(self._waiting.get(), left)
                else:
                    entry = self._waiting.get_nowait()
            except (asyncio.TimeoutError, asyncio.QueueEmpty):
                return None
            candidates += count_candidates(entry[0])
            if candidates > limits.max_candidates:
                return entry
            batch.append(entry)
        return None
