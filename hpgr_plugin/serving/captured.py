"""Requests over kept histories, replayed from CUDA graphs: one launch in place of about 80."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hpgr_plugin.log_once import log_once
from hpgr_plugin.serving import chunks
from hpgr_plugin.serving.history_cache import HistoryState
from hpgr_plugin.serving.kept_candidates import KeptCandidates
from hpgr_plugin.serving.padded import PaddedRequest, Sizes
from hpgr_plugin.serving.requests import EncodedCandidates

logger = logging.getLogger(__name__)

MOST_GRAPHS = 16
_MOST_SEEN = 1 << 10

_Replay = Callable[[], Tensor]  # of what was loaded: the scores, valid until the next replay


class CapturedCandidates:
    """Scores of requests whose sizes come more than once.

    A size is captured when it comes for the second time, and the least recently used graph goes
    where there are too many. Weights must not change. On a CPU, the same function runs as it is.

    Args:
        kept: of the model.
        most_graphs: that are kept.

    Attributes:
        replayed: requests that a graph scored so far.
    """

    def __init__(self, kept: KeptCandidates, *, most_graphs: int = MOST_GRAPHS) -> None:
        self._kept = kept
        self._most_graphs = most_graphs
        self._graphs: OrderedDict[Sizes, tuple[PaddedRequest, _Replay]] = OrderedDict()
        self._seen: set[Sizes] = set()
        self._refused: set[Sizes] = set()
        self._pool: Any = None
        self.replayed = 0
        # A table in parts is looked up by several processes together.
        self._serves = isinstance(kept.model.item_table, nn.Embedding)

    def __len__(self) -> int:
        """Graphs that are kept."""
        return len(self._graphs)

    @property
    def num_bytes(self) -> int:
        """Memory that the graphs share on the device; 0 on a CPU, where nothing is set apart."""
        if self._pool is None:
            return 0
        return sum(
            segment["total_size"]
            for segment in torch.cuda.memory_snapshot()
            if tuple(segment["segment_pool_id"]) == tuple(self._pool)
        )

    def scores(
        self, requests: Sequence[EncodedCandidates], states: Sequence[HistoryState]
    ) -> list[Tensor | None]:
        """Of each request, `PaddedRequest.scores` without its padding; one ready state each.

        None: the size is new, too large, or cannot be captured; `KeptCandidates.logits` has them.
        """
        found = [self._graph(*pair) for pair in zip(requests, states, strict=True)]
        packed = [
            graph[0].pack(request, state)
            for graph, request, state in zip(found, requests, states, strict=True)
            if graph is not None
        ]
        if not packed:
            return [None] * len(requests)
        moved = iter(self._kept.moved(np.concatenate(packed)).split([len(one) for one in packed]))
        scores: list[Tensor | None] = []
        for graph, request, state in zip(found, requests, states, strict=True):
            if graph is None or state.ready is None:
                scores.append(None)
                continue
            padded, replay = graph
            padded.load(next(moved), state.ready)
            scores.append(replay()[:, : request.candidates.shape[1]].clone())
            self.replayed += 1
        return scores

    def _graph(
        self, request: EncodedCandidates, state: HistoryState
    ) -> tuple[PaddedRequest, _Replay] | None:
        """What scores a request; the graph is made where its size comes again."""
        assert state.ready is not None
        sizes = Sizes.of(request, state)
        if sizes in self._graphs:
            self._graphs.move_to_end(sizes)
            return self._graphs[sizes]
        if not self._serves or sizes in self._refused or self._is_large(sizes):
            return None
        if sizes not in self._seen:
            if len(self._seen) >= _MOST_SEEN:
                self._seen.clear()
            self._seen.add(sizes)
            return None
        return self._capture(sizes, request, state)

    def _is_large(self, sizes: Sizes) -> bool:
        """Whether a request is computed some candidates at a time: launches cost less than that."""
        width = (self._kept.context + sizes.items) * self._kept.num_heads
        return sizes.candidates * width > chunks.ON_GPU

    def _capture(
        self, sizes: Sizes, request: EncodedCandidates, state: HistoryState
    ) -> tuple[PaddedRequest, _Replay] | None:
        """A new graph for requests of this size; None where it cannot be made."""
        assert state.ready is not None
        while len(self._graphs) >= self._most_graphs:
            self._graphs.popitem(last=False)
        try:
            padded = PaddedRequest(self._kept, sizes, state.ready)
            padded.load(self._kept.moved(padded.pack(request, state)), state.ready)
            replay = padded.scores if self._kept.device.type == "cpu" else self._replay_of(padded)
        except RuntimeError as error:  # mostly for lack of memory
            self._refused.add(sizes)
            log_once(
                logger,
                "no CUDA graph of some requests, which are scored launch by launch: "
                f"{_first_line(error)}",
                logging.WARNING,
            )
            return None
        self._graphs[sizes] = padded, replay
        return self._graphs[sizes]

    def _replay_of(self, padded: PaddedRequest) -> _Replay:
        """Capture the function of what is loaded."""
        # A capture that fails leaves its stream the current one, but for the context here.
        with torch.cuda.device(self._kept.device), torch.cuda.stream(torch.cuda.current_stream()):
            return self._captured(padded)

    def _captured(self, padded: PaddedRequest) -> _Replay:
        """See `_replay_of`, on the current device."""
        if not self._graphs:
            # CUDA's allocator refuses a pool whose graphs are gone while their memory is in use.
            self._pool = torch.cuda.graph_pool_handle()
        # Compile kernels and create handles, on another stream as a capture needs it.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            padded.scores()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = padded.scores()

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay


def _first_line(error: BaseException) -> str:
    """Of the error that another one came from; the end of a capture has an error of its own."""
    while error.__context__ is not None:
        error = error.__context__
    return str(error).partition("\n")[0]
