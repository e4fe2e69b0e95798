"""A differentiable function of tensors as CUDA graphs, one for each set of sizes.

A step over few rows takes less time to compute than to launch. A graph is one launch, but its sizes
and addresses are fixed: inputs are copied to where the graph reads them, into tensors of the next
of a few sizes. Parameters are read where they are.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hpgr_plugin.components.capture_checks import state_of_torch, why_pass_not_captured
from hpgr_plugin.log_once import log_once

logger = logging.getLogger(__name__)

MOST_GRAPHS = 24
_MANY_ROWS = 1 << 16
_MOST_SEEN = 1 << 10


class PaddedInput(NamedTuple):
    """An input, and the rows that its copy has.

    Attributes:
        values: `[n, ...]`.
        size: at least n.
        filler: of row n.
        step: what every row behind that adds, in copies of one dimension; 0: all are `filler`.
    """

    values: Tensor
    size: int
    filler: float = 0
    step: int = 0

    def empty(self) -> Tensor:
        """Where copies go, `[size, ...]`, with what lies behind the values."""
        values = self.values
        shape = self.size, *values.shape[1:]
        padded = torch.zeros(shape, dtype=values.dtype, device=values.device)
        self.fill(padded[len(values) :])
        return padded.requires_grad_(values.requires_grad)

    def fill(self, rest: Tensor) -> None:
        """Write the rows from n on, which may be none."""
        if self.step:
            end = self.filler + self.step * len(rest)
            torch.arange(self.filler, end, self.step, out=rest)
        else:
            rest.fill_(self.filler)


Inputs = Mapping[str, PaddedInput]
Function = Callable[[dict[str, Tensor], dict[str, Tensor]], Tensor]


def padded_size(count: int) -> int:
    """The next multiple of an eighth of the power of two below, at least of 16.

    From 65536 on it is a thirty-second: there, padding costs more than another graph.
    """
    parts = 3 if count < _MANY_ROWS else 5
    step = max(16, 1 << max(0, count.bit_length() - 1 - parts))
    return max(1, -(-count // step)) * step


@torch.no_grad()
def load(inputs: Inputs, targets: Mapping[str, Tensor]) -> None:
    """Copy inputs to the front of `targets`, and fill the rest."""
    fronts, zeroed = [], []
    for name, given in inputs.items():
        target, count = targets[name], given.values.shape[0]
        if count == given.size:
            fronts.append(target)
            continue
        fronts.append(target[:count])
        if given.filler or given.step:
            given.fill(target[count:])
        else:
            zeroed.append(target[count:])
    copy_all(fronts, [given.values for given in inputs.values()])
    if zeroed:
        torch._foreach_zero_(zeroed)


class CapturedFunction:
    """Replays a function, forward and backward, from graphs.

    One pass at a time: from its forward until its backward has run, or until it is dropped without
    one, a graph holds what the backward needs. Meanwhile `run` returns None. Between the two, the
    parameters must not change.

    Args:
        binding: the gin binding that switches capturing off, for an error.
    """

    def __init__(self, binding: str) -> None:
        self._binding = binding
        self._graphs: dict[Hashable, _Graph] = {}
        self._seen: set[Hashable] = set()
        self._places: Hashable = ()
        self._pool: Any = None
        self._in_flight: weakref.ref[_Flight] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Graphs belong to this process and these tensors: a copy captures its own.
        return vars(CapturedFunction(self._binding))

    def run(
        self,
        function: Function,
        inputs: Inputs,
        parameters: Mapping[str, Tensor],
        key: Hashable,
        *,
        rows: int | None = None,
        most_graphs: int = MOST_GRAPHS,
        at_first: bool = True,
    ) -> Tensor | None:
        """`function` of the padded inputs, or None where it has to run launch by launch.

        Args:
            function: of inputs and parameters by name to one tensor; it must not wait for the
                device, and what it computes depends on these and on `key` only.
            inputs: by name, on one CUDA device.
            parameters: by name, all parameters and buffers that the function reads, frozen ones
                too. The function gets others with the same memory: what another pass has recorded
                for these must not enter a graph.
            key: what tells calls apart beside sizes, dtypes and which tensors need a gradient.
            rows: how many of the output's first rows to return; None: all.
            most_graphs: while so many are kept, no other is captured.
            at_first: capture a pass of new sizes when it first comes, not when it comes again.

        Raises:
            RuntimeError: the function cannot be captured.
        """
        if not torch.is_grad_enabled() or not _can_learn(inputs, parameters):
            return None
        if reason := why_pass_not_captured() or self._why_busy():
            log_once(logger, f"{self._binding} = True has no effect on a pass: {reason}")
            return None
        if torch.cuda.is_current_stream_capturing():
            return None
        places = memory_of(parameters)
        if places != self._places:  # a graph would go on reading the old ones
            self._graphs.clear()
            self._places = places
        key = key, state_of_torch(), forms(inputs, parameters)
        if key not in self._graphs:
            if not at_first and self._is_new(key):
                return None
            if len(self._graphs) >= most_graphs:
                log_once(
                    logger,
                    f"{self._binding}: {most_graphs} graphs are kept; passes of other sizes or "
                    "settings run without one",
                )
                return None
            self._graphs[key] = self._capture(function, inputs, parameters)
        graph = self._graphs[key]
        flight = _Flight(graph)
        self._in_flight = weakref.ref(flight)
        learned = [inputs[name].values for name in graph.learned]
        trained = [parameters[name] for name in graph.trained]
        output: Tensor = _Replay.apply(flight, inputs, self._binding, rows, *learned, *trained)
        return output

    def _is_new(self, key: Hashable) -> bool:
        if key in self._seen:
            return False
        if len(self._seen) >= _MOST_SEEN:
            self._seen.clear()
        self._seen.add(key)
        return True

    def _why_busy(self) -> str | None:
        flight = None if self._in_flight is None else self._in_flight()
        if flight is None or flight.graph is None:
            return None
        return "the output of an earlier one is kept, and its backward has not run"

    def _capture(
        self, function: Function, inputs: Inputs, parameters: Mapping[str, Tensor]
    ) -> _Graph:
        if not self._graphs:
            # CUDA's allocator refuses a pool whose graphs are gone while their memory is in use.
            self._pool = torch.cuda.graph_pool_handle()
        try:
            return _Graph(function, inputs, parameters, self._pool)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RuntimeError(
                f"the pass cannot be captured as a CUDA graph; bind {self._binding} = False"
            ) from error


def _can_learn(inputs: Inputs, parameters: Mapping[str, Tensor]) -> bool:
    """Whether something needs a gradient, and gradients end at the parameters."""
    given = (padded.values for padded in inputs.values())
    needed = any(t.requires_grad for t in (*given, *parameters.values()))
    return needed and all(p.is_leaf for p in parameters.values())


def memory_of(parameters: Mapping[str, Tensor]) -> Hashable:
    """Where the parameters are, and how they lie there."""
    return tuple(
        (name, p.data_ptr(), p.dtype, p.shape, p.stride()) for name, p in parameters.items()
    )


def forms(inputs: Inputs, parameters: Mapping[str, Tensor]) -> Hashable:
    """Sizes and dtypes of padded inputs, and which tensors need a gradient."""
    padded = tuple(
        (name, given.size, given.values.shape[1:], given.values.dtype, given.values.requires_grad)
        for name, given in inputs.items()
    )
    return padded, tuple(name for name, p in parameters.items() if p.requires_grad)


class _Graph:
    """The function for inputs of certain sizes, captured forward and backward."""

    def __init__(
        self, function: Function, inputs: Inputs, parameters: Mapping[str, Tensor], pool: Any
    ) -> None:
        self.inputs = {name: given.empty() for name, given in inputs.items()}
        self.learned = [name for name, given in self.inputs.items() if given.requires_grad]
        self.trained = [name for name, p in parameters.items() if p.requires_grad]
        load(inputs, self.inputs)
        # Weights that autocast keeps between calls would be read where they no longer are.
        autocast = torch.autocast(
            "cuda",
            dtype=torch.get_autocast_dtype("cuda"),
            enabled=torch.is_autocast_enabled("cuda"),
            cache_enabled=False,
        )
        with torch.enable_grad(), autocast:
            self._warm_up(function, parameters)
            self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
            # Threads of a data loader or of a process group may use the device meanwhile.
            settings: dict[str, Any] = {"pool": pool, "capture_error_mode": "thread_local"}
            own = _same_memory(parameters)
            with torch.cuda.graph(self.forward, **settings):
                output = function(self.inputs, own)
            self.grad = torch.zeros_like(output)
            with torch.cuda.graph(self.backward, **settings):
                self.grads = self._gradients(output, own, self.grad)
        self.output = output.detach()

    def _warm_up(self, function: Function, parameters: Mapping[str, Tensor]) -> None:
        """Compile kernels and create handles, on another stream as a capture needs it."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            own = _same_memory(parameters)
            output = function(self.inputs, own)
            self._gradients(output, own, torch.zeros_like(output))
        torch.cuda.current_stream().wait_stream(stream)

    def _gradients(
        self, output: Tensor, parameters: Mapping[str, Tensor], grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Of learned inputs, then of trained parameters; None where the output does not depend."""
        learned = [self.inputs[name] for name in self.learned]
        wanted = [*learned, *(parameters[name] for name in self.trained)]
        return torch.autograd.grad(output, wanted, grad, allow_unused=True)


def _same_memory(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """New leaves over the memory of these."""
    return {n: p.detach().requires_grad_(p.requires_grad) for n, p in parameters.items()}


class _Flight:
    """One pass through a graph, alive as long as its backward may come."""

    def __init__(self, graph: _Graph) -> None:
        self.graph: _Graph | None = graph


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        flight: _Flight,
        inputs: Inputs,
        binding: str,
        rows: int | None,
        *tensors: Tensor,
    ) -> Tensor:
        """`tensors` are the learned inputs, then the trained parameters."""
        graph = flight.graph
        assert graph is not None
        load(inputs, graph.inputs)
        graph.forward.replay()
        ctx.flight, ctx.binding = flight, binding
        ctx.used = [len(inputs[name].values) for name in graph.learned]
        ctx.save_for_backward(*tensors[len(ctx.used) :])
        return graph.output[:rows].clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        graph = ctx.flight.graph
        if graph is None:
            raise RuntimeError(
                f"a captured pass has one backward only: with {ctx.binding} = False "
                "retain_graph=True works"
            )
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"gradients of a captured pass have no gradient: bind {ctx.binding} = False for "
                "create_graph=True"
            )
        _ = ctx.saved_tensors  # raises if one was changed in place since the forward
        graph.grad[: len(grad)].copy_(grad)
        if len(grad) < len(graph.grad):
            graph.grad[len(grad) :].zero_()
        graph.backward.replay()
        fronts = [None if g is None else g[:n] for g, n in zip(graph.grads, ctx.used, strict=False)]
        grads = [*fronts, *graph.grads[len(fronts) :]]
        there = [g for g in grads if g is not None]
        copies = [torch.empty_like(g) for g in there]
        copy_all(copies, there)
        ctx.flight.graph = None
        copied = iter(copies)
        return None, None, None, None, *(None if g is None else next(copied) for g in grads)


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy tensors into others of their shapes, a launch for each pair of dtypes."""
    groups: dict[tuple[torch.dtype, torch.dtype], list[tuple[Tensor, Tensor]]] = {}
    for target, source in zip(targets, sources, strict=True):
        groups.setdefault((target.dtype, source.dtype), []).append((target, source))
    for pairs in groups.values():
        torch._foreach_copy_([target for target, _ in pairs], [source for _, source in pairs])
