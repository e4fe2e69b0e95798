"""Layers over sequences with one candidate each, as CUDA graphs by size.

Short sequences take less time to compute than to launch. A graph is one launch, but its sizes and
addresses are fixed: rows and sequences are padded up to the next of a few sizes, and inputs and
weights are copied to where the graph reads them. Weights are copied at every step, so an optimizer
may change or replace them as it likes.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hpgr_plugin.components.hstu_stack import read_sequences
from hpgr_plugin.ops.hstu_attention import AttentionSpec
from hpgr_plugin.ops.hstu_layer import Dropout, LayerForm, LayerWeights

_MOST_ROWS = 1 << 16  # beyond, launches cost less than the work
_MOST_GRAPHS = 24
# n of 1/n inside a graph, the same for all: the real one is a factor of the column weights.
_NORM_LENGTH = 1024.0


class Sizes(NamedTuple):
    """Of a padded pass: rows, sequences, an upper bound of their lengths, and the rows' dtype."""

    rows: int
    sequences: int
    max_length: int
    dtype: torch.dtype


class Inputs(NamedTuple):
    """What a pass reads beside weights.

    Attributes:
        rows: `[R, D]`.
        column_weights: `[R]`.
        offsets: `[C + 1]`, every sequence ends in its candidate.
        max_length: an upper bound of the lengths.
        norm_length: n of 1/n.
    """

    rows: Tensor
    column_weights: Tensor
    offsets: Tensor
    max_length: int
    norm_length: float

    def sizes(self) -> Sizes:
        """Those that the pass is padded to."""
        return Sizes(
            padded_size(len(self.rows)),
            padded_size(len(self.offsets) - 1),
            padded_size(self.max_length),
            self.rows.dtype,
        )


def padded_size(count: int) -> int:
    """The next multiple of an eighth of the power of two below, at least of 16."""
    step = max(16, 1 << max(0, count.bit_length() - 4))
    return -(-count // step) * step


def weight_buffers(parameters: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Where copies of the parameters go: norms in their own dtype, the others in `dtype`.

    Args:
        parameters: in the order of `LayerWeights`, one layer after another.
        dtype: of the rows.
    """
    fields = LayerWeights._fields * (len(parameters) // len(LayerWeights._fields))
    return [
        torch.empty_like(p, dtype=p.dtype if "norm" in name else dtype).requires_grad_()
        for p, name in zip(parameters, fields, strict=True)
    ]


class PaddedPass:
    """Tensors of fixed sizes, and the layers over them.

    Args:
        sizes: of the tensors.
        weights: of the layers, see `weight_buffers`.
        form: of the layers.
        alpha: factor of `q . k`.
    """

    def __init__(self, sizes: Sizes, weights: list[Tensor], form: LayerForm, alpha: float) -> None:
        device, width = weights[0].device, len(weights[0])
        self.weights = weights
        self.rows = torch.zeros(
            sizes.rows, width, dtype=sizes.dtype, device=device, requires_grad=True
        )
        exact = torch.promote_types(sizes.dtype, torch.float32)
        self.column_weights = torch.zeros(sizes.rows, dtype=exact, device=device)
        self.offsets = torch.zeros(sizes.sequences + 1, dtype=torch.int64, device=device)
        self.one_each = torch.arange(sizes.sequences + 1, device=device)
        self.seed = torch.zeros(1, dtype=torch.int64, device=device)
        dropout = form.dropout
        self.form = form._replace(
            dropout=None if dropout is None else Dropout(dropout.rate, self.seed)
        )
        self.max_length, self.alpha = sizes.max_length, alpha

    @torch.no_grad()
    def load(self, inputs: Inputs, parameters: Sequence[Tensor], seed: Tensor | None) -> None:
        """Copy the inputs of a step; what is beyond them is zero, or an empty sequence."""
        used, sequences = len(inputs.rows), len(inputs.offsets) - 1
        self.rows[:used].copy_(inputs.rows)
        self.rows[used:].zero_()
        torch.mul(
            inputs.column_weights,
            _NORM_LENGTH / inputs.norm_length,
            out=self.column_weights[:used],
        )
        self.offsets[: sequences + 1].copy_(inputs.offsets)
        self.offsets[sequences + 1 :].fill_(used)
        copy_all(self.weights, parameters)
        if seed is not None:
            self.seed.copy_(seed)

    def candidates(self) -> Tensor:
        """`[sequences, D]`; those of empty sequences have no meaning and no gradient."""
        # A new one each time: what a backend derives from it belongs to the inputs.
        spec = AttentionSpec(
            offsets=self.offsets,
            column_weights=self.column_weights,
            max_length=self.max_length,
            alpha=self.alpha,
            norm_length=_NORM_LENGTH,
        )
        count = len(LayerWeights._fields)
        layers = [
            LayerWeights(*self.weights[i : i + count]) for i in range(0, len(self.weights), count)
        ]
        return read_sequences(
            self.rows,
            layers,
            spec,
            self.form,
            candidate_offsets=self.one_each,
            candidate_rows=(self.offsets[1:] - 1).clamp(min=0),
            max_candidates=1,
        )


class CapturedStack:
    """`read_sequences` for sequences with one candidate each, replayed from graphs.

    One pass at a time: from its forward until its backward has run, or until it is dropped without
    one, a graph holds what the backward needs. Meanwhile `run` returns None.
    """

    def __init__(self) -> None:
        self._graphs: dict[tuple[Any, ...], _Graph] = {}
        self._weights: dict[torch.dtype, list[Tensor]] = {}
        self._pool: Any = None
        self._in_flight: weakref.ref[_Flight] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Graphs belong to this process and these tensors: a copy captures its own.
        return vars(CapturedStack())

    def run(
        self, inputs: Inputs, parameters: Sequence[Tensor], form: LayerForm, alpha: float
    ) -> Tensor | None:
        """Candidates `[C, D]`, or None where the pass has to run launch by launch.

        Args:
            inputs: of the pass, on a CUDA device.
            parameters: of the layers, in the order of `LayerWeights`, one layer after another.
            form: of the layers.
            alpha: factor of `q . k`.
        """
        if self._busy() or not 0 < len(inputs.rows) <= _MOST_ROWS or not torch.is_grad_enabled():
            return None
        if torch.cuda.is_current_stream_capturing():
            return None
        rate = 0.0 if form.dropout is None else form.dropout.rate
        key = (inputs.sizes(), alpha, form.num_heads, form.eps, rate, inputs.rows.device)
        if key not in self._graphs:
            if len(self._graphs) >= _MOST_GRAPHS:
                return None
            self._graphs[key] = self._capture(inputs, parameters, form, alpha)
        flight = _Flight(self._graphs[key])
        self._in_flight = weakref.ref(flight)
        seed = None if form.dropout is None else form.dropout.seed
        output: Tensor = _Replay.apply(flight, inputs, seed, inputs.rows, *parameters)
        return output

    def _busy(self) -> bool:
        flight = None if self._in_flight is None else self._in_flight()
        return flight is not None and flight.graph is not None

    def _capture(
        self, inputs: Inputs, parameters: Sequence[Tensor], form: LayerForm, alpha: float
    ) -> _Graph:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        dtype = inputs.rows.dtype
        if dtype not in self._weights:
            self._weights[dtype] = weight_buffers(parameters, dtype)
        # Computing again is for large passes: here launches are what costs.
        form = form._replace(recompute=False)
        padded = PaddedPass(inputs.sizes(), self._weights[dtype], form, alpha)
        padded.load(inputs, parameters, None if form.dropout is None else form.dropout.seed)
        return _Graph(padded, self._pool)


class _Graph:
    """A padded pass, captured forward and backward."""

    def __init__(self, padded: PaddedPass, pool: Any) -> None:
        self.padded = padded
        wanted = [padded.rows, *padded.weights]
        with torch.enable_grad():
            self._warm_up(wanted)
            self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
            # Threads of a data loader or of a process group may use the device meanwhile.
            settings: dict[str, Any] = {"pool": pool, "capture_error_mode": "thread_local"}
            with torch.cuda.graph(self.forward, **settings):
                output = padded.candidates()
            self.grad = torch.zeros_like(output)
            with torch.cuda.graph(self.backward, **settings):
                self.grads = torch.autograd.grad(output, wanted, self.grad)
        self.output = output.detach()

    def _warm_up(self, wanted: list[Tensor]) -> None:
        """Compile kernels and create handles, on another stream as a capture needs it."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            output = self.padded.candidates()
            torch.autograd.grad(output, wanted, torch.zeros_like(output))
        torch.cuda.current_stream().wait_stream(stream)


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
        seed: Tensor | None,
        rows: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        graph = flight.graph
        assert graph is not None
        graph.padded.load(inputs, parameters, seed)
        graph.forward.replay()
        ctx.flight, ctx.used = flight, len(rows)
        ctx.parameters = [(p.shape, p.dtype) for p in parameters]
        return graph.output[: len(inputs.offsets) - 1].clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        graph = ctx.flight.graph
        if graph is None:
            raise RuntimeError(
                "a captured pass has one backward only: without captured layers "
                "(hpgr.DlrmHSTU.capture = False) retain_graph=True works"
            )
        graph.grad[: len(grad)].copy_(grad)
        graph.grad[len(grad) :].zero_()
        graph.backward.replay()
        d_rows, *of_weights = graph.grads
        copies = [
            torch.empty(shape, dtype=dtype, device=grad.device) for shape, dtype in ctx.parameters
        ]
        copy_all(copies, of_weights)
        d_rows = d_rows[: ctx.used].clone()
        ctx.flight.graph = None
        return None, None, None, d_rows, *copies


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy tensors into others of their shapes, a launch for each pair of dtypes."""
    groups: dict[tuple[torch.dtype, torch.dtype], list[tuple[Tensor, Tensor]]] = {}
    for target, source in zip(targets, sources, strict=True):
        groups.setdefault((target.dtype, source.dtype), []).append((target, source))
    for pairs in groups.values():
        torch._foreach_copy_([target for target, _ in pairs], [source for _, source in pairs])
