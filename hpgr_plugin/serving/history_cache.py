"""What is kept of a user's history: keys and values of every layer, least recently used first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from hpgr_plugin.serving.anchors import ScoredHistory
from hpgr_plugin.serving.kept_rows import Window


@dataclass(frozen=True, eq=False)
class ReadyPlan:
    """What the plans of candidates that see a whole history are made from.

    Attributes:
        scored: chooses the anchors; None: there are none.
        window: of the anchors, or None.
        near: int64 `[W]`, the tokens that every candidate reads.
        end: int64 `[]`, the last item that may be in a window.
    """

    scored: ScoredHistory | None
    window: Window | None
    near: Tensor
    end: Tensor

    @property
    def num_bytes(self) -> int:
        """Memory of the tensors but for the window, which is that of others too."""
        scored = 0 if self.scored is None else self.scored.num_bytes
        return scored + self.near.nbytes + self.end.nbytes


@dataclass(frozen=True, eq=False)
class ReadyHistory:
    """What candidates read of a history that they all see whole.

    Attributes:
        layers: `[2, layers, H, N, d]`, keys and values.
        marks: int64 `[2, N]`, the tokens' places in a bias by their distance, no time passed, and
            their times.
        plan: what is kept for each candidate; None: all tokens.
    """

    layers: Tensor
    marks: Tensor
    plan: ReadyPlan | None

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.layers.shape[3]

    @cached_property
    def keys(self) -> tuple[Tensor, ...]:
        """`[H, N, d]` of every layer."""
        return self.layers[0].unbind(0)

    @cached_property
    def values(self) -> tuple[Tensor, ...]:
        """`[H, N, d]` of every layer."""
        return self.layers[1].unbind(0)

    @cached_property
    def near_rows(self) -> Tensor:
        """Keys and values of the tokens that all candidates of a plan read.

        `[2, layers, H, W, d]`; on a GPU a kernel finds them.
        """
        assert self.plan is not None
        return self.layers.index_select(3, self.plan.near)

    @property
    def num_bytes(self) -> int:
        """Memory of the tensors but for keys and values, which are those of the state."""
        if self.plan is None:
            return self.marks.nbytes
        near = 0 if self.layers.is_cuda else self.layers[:, :, :, :1].nbytes * len(self.plan.near)
        return self.marks.nbytes + self.plan.num_bytes + near


@dataclass(frozen=True)
class HistoryState:
    """The encoded context and history of one user, N tokens.

    Attributes:
        tokens: `[N, D]`, what the layers were given. Equal tokens with equal marks have equal keys
            and values, so a state is used where these are equal (tokens but for rounding: SEM sums
            in another order when sessions are added), and only there.
        marks: int64 `[N, columns]`, positions, times, orders and domains.
        keys, values: `[H, N, d]` of every layer, H heads.
        version: what the tokens were made from; equal versions with equal marks have equal tokens.
            None: not known.
        history: int64 `[3, n]` on the host, the items, times and actions of the history among the
            tokens; None: not known.
        ready: what further requests of it need, or None until one came.
    """

    tokens: Tensor
    marks: Tensor
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    version: Hashable = None
    history: np.ndarray | None = None
    ready: ReadyHistory | None = None

    @property
    def num_bytes(self) -> int:
        """Memory of the tensors."""
        tensors = (self.tokens, self.marks, *self.keys, *self.values)
        ready = 0 if self.ready is None else self.ready.num_bytes
        history = 0 if self.history is None else self.history.nbytes
        return ready + history + sum(tensor.nbytes for tensor in tensors)

    @property
    def num_items(self) -> int:
        """n, of a known history."""
        assert self.history is not None
        return self.history.shape[1]

    def is_of(self, version: Hashable, marks: Tensor) -> bool:
        """Whether the tokens of this version with these marks are those of this state."""
        return version is not None and version == self.version and torch.equal(self.marks, marks)

    def is_prefix_of(self, tokens: Tensor, marks: Tensor) -> bool:
        """Whether these tokens begin with the ones of this state."""
        count = len(self.tokens)
        return (
            count <= len(tokens)
            and torch.equal(self.marks, marks[:count])
            and torch.allclose(self.tokens, tokens[:count], rtol=1e-5, atol=1e-6)
        )


@dataclass
class CacheCounts:
    """How often a history was found whole, found in part, or not found; and states dropped."""

    hits: int = 0
    extended: int = 0
    misses: int = 0
    evicted: int = 0


@dataclass
class HistoryCache:
    """States by user, within a bound on their memory.

    Not made for several threads at once: the server scores in one.

    Attributes:
        max_bytes: bound on the memory of all states; 0 keeps none.
        counts: since the start.
    """

    max_bytes: int
    counts: CacheCounts = field(default_factory=CacheCounts)
    num_bytes: int = field(default=0, init=False)
    _states: OrderedDict[Hashable, HistoryState] = field(default_factory=OrderedDict, init=False)

    def __len__(self) -> int:
        return len(self._states)

    def get(self, key: Hashable) -> HistoryState | None:
        """The state of a user, which is now the most recently used."""
        state = self._states.get(key)
        if state is not None:
            self._states.move_to_end(key)
        return state

    def put(self, key: Hashable, state: HistoryState) -> None:
        """Keep a state in place of an older one; drop others until all fit."""
        self.drop(key)
        if state.num_bytes > self.max_bytes:
            return
        self._states[key] = state
        self.num_bytes += state.num_bytes
        while self.num_bytes > self.max_bytes:
            self.drop(next(iter(self._states)))
            self.counts.evicted += 1

    def drop(self, key: Hashable) -> None:
        """Forget the state of a user, if there is one."""
        state = self._states.pop(key, None)
        if state is not None:
            self.num_bytes -= state.num_bytes

    def clear(self) -> None:
        """Forget all states."""
        self._states.clear()
        self.num_bytes = 0
