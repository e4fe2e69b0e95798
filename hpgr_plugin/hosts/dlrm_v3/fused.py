"""The host's STU layers on this package's kernels, with the host's own parameters.

The parameters stay the host's objects, so checkpoints, optimizers and gradients stay what they are.
The last layer computes only the candidates: nothing in the host's ranking model reads its other
rows.
"""

from __future__ import annotations

import functools
import logging
from typing import Any, Literal, NamedTuple

import torch
from generative_recommenders.common import HammerKernel
from generative_recommenders.modules.stu import STULayer, STUStack
from torch import Tensor, nn

from hpgr_plugin.components.captured_stack import CapturedStack, Inputs
from hpgr_plugin.components.hstu_stack import read_histories, read_sequences
from hpgr_plugin.errors import HpgrError
from hpgr_plugin.hosts.dlrm_v3.attention import (
    CandidateRows,
    PreferenceSTULayer,
    RowSequences,
    StepAttention,
)
from hpgr_plugin.ops.compact.parts import row_weights
from hpgr_plugin.ops.dispatch import backend_choices, operators
from hpgr_plugin.ops.hstu_attention import AttentionSpec
from hpgr_plugin.ops.hstu_layer import Dropout, LayerForm, LayerWeights
from hpgr_plugin.ops.jagged import segment_ids

Layers = Literal["host", "fused"]

logger = logging.getLogger(__name__)

# What an attribute of the host's layer must be, and in words what it is otherwise.
_OPTIONS: dict[str, tuple[object, str]] = {
    "_use_group_norm": (False, "group norm (hstu_group_norm)"),
    "_max_attn_len": (0, "a bounded reach of the attention (max_attn_len)"),
    "_contextual_seq_len": (0, "contextual tokens that see the whole sequence"),
    "_causal": (True, "attention that is not causal"),
    "_target_aware": (True, "candidates that see each other (target_aware=False)"),
}
_EQUAL = ("_num_heads", "_attention_dim", "_hidden_dim", "_attn_alpha", "_output_dropout_ratio")
_RECOMPUTE = ("_recompute_normed_x", "_recompute_uvqk", "_recompute_y")
# Below so many rows what is kept for the backward is little, and launches are what costs.
_MANY_ROWS = 1 << 14


class FusedLayers:
    """A stack of the host's layers, run as one.

    Args:
        stack: The host's, of the model that is being built.
        choice: "fused", "host", or None: fused where the Triton kernels can run the step, else the
            host's layers; the log says once which it is.
        binding: The name of the choice in an error.
        capture: Whether small passes over one sequence per candidate run as CUDA graphs, from the
            second on.

    Raises:
        HpgrError: "fused" with an option of the host that is not supported.
    """

    def __init__(
        self, stack: nn.Module, choice: Layers | None, *, binding: str, capture: bool = False
    ) -> None:
        self._stack: Any = stack
        self._captured = CapturedStack() if capture else None
        self._has_run = False
        self._choice = choice
        self._binding = binding
        self._unsupported = unsupported_option(stack)
        if choice == "fused" and self._unsupported is not None:
            raise self._error(f"does not support {self._unsupported}")

    def run(self, x: Tensor, sequences: RowSequences, step: StepAttention) -> Tensor | None:
        """The candidates `[C, D]` in their order, or None: the host's own layers have to run.

        Args:
            x: `[L, D]`.
            sequences: That the rows belong to.
            step: What a plan changes in their attention.

        Raises:
            HpgrError: "fused" was chosen, and the kernels cannot run this step on its device.
        """
        if self._choice == "host" or torch.jit.is_tracing():
            return None
        reason = None if self._choice == "fused" else self._unsupported or self._slower(x)
        if reason is None:
            with torch.autocast(x.device.type, enabled=False):
                replayed = self._replay(x, sequences, step)
                if replayed is not None:
                    return replayed
                job = _job(self._stack, x.contiguous(), sequences, step)
                reason = job.why_not() if x.is_cuda else None
                if reason is None:
                    _say("the STU layers run on this package's kernels, with the host's weights")
                    self._has_run = True
                    return job.candidates()
        if self._choice == "fused":
            raise self._error(f"cannot run this step: {reason}")
        _say(f"the STU layers run on the host's kernels: {reason}")
        return None

    def _replay(self, x: Tensor, sequences: RowSequences, step: StepAttention) -> Tensor | None:
        """The pass from a graph, or None."""
        captured, weights = self._captured, step.column_weights
        if captured is None or weights is None or not (self._has_run and x.is_cuda):
            return None
        if step.mask_position != "post" or not sequences.one_target:
            return None
        if backend_choices().get("hstu_layer", "triton") != "triton":
            return None
        inputs = Inputs(
            x,
            weights,
            sequences.parts.seq_offsets,
            sequences.max_length,
            sequences.max_length / step.norm_ratio,
        )
        layers = self._stack._stu_layers
        parameters = [p for layer in layers for p in _parameters(layer)]
        return captured.run(inputs, parameters, _form(self._stack, x), layers[0]._attn_alpha)

    def _slower(self, x: Tensor) -> str | None:
        """Why the host's layers are the faster ones for these rows, or None."""
        if not x.is_cuda:
            return "the rows are not on a CUDA device"
        kernel = self._stack.hammer_kernel()
        if kernel != HammerKernel.TRITON:
            return f"the host was told to use {kernel.value}"
        return None

    def _error(self, reason: str) -> HpgrError:
        return HpgrError(
            f'{self._binding} = "fused" {reason}; bind {self._binding} = "host", or None for the '
            "host's layers where they are needed"
        )


def unsupported_option(stack: Any) -> str | None:
    """The first option of the host's layers that the kernels do not have, or None."""
    if type(stack) is not STUStack or not len(stack._stu_layers):
        return f"a {type(stack).__name__} in place of a stack of layers"
    for layer in stack._stu_layers:
        if type(layer) not in (STULayer, PreferenceSTULayer):
            return f"layers of class {type(layer).__name__}"
        for name, (supported, otherwise) in _OPTIONS.items():
            if getattr(layer, name) != supported:
                return otherwise
    for name in _EQUAL:
        if len({getattr(layer, name) for layer in stack._stu_layers}) > 1:
            return f"layers that differ in {name.lstrip('_')}"
    return None


def layer_weights(stack: Any, dtype: torch.dtype) -> list[LayerWeights]:
    """The parameters of the host's layers; matrices and their biases in `dtype`."""
    layers = [_parameters(layer) for layer in stack._stu_layers]
    names = ("projection_weight", "projection_bias", "output_weight")
    flat = in_dtype([getattr(layer, name) for layer in layers for name in names], dtype)
    count = len(names)
    return [
        layer._replace(**dict(zip(names, flat[count * i : count * (i + 1)], strict=True)))
        for i, layer in enumerate(layers)
    ]


def _parameters(layer: Any) -> LayerWeights:
    """The parameters of one of the host's layers as they are."""
    return LayerWeights(
        norm_weight=layer._input_norm_weight,
        norm_bias=layer._input_norm_bias,
        projection_weight=layer._uvqk_weight,
        projection_bias=layer._uvqk_beta,
        output_norm_weight=layer._output_norm_weight,
        output_norm_bias=layer._output_norm_bias,
        output_weight=layer._output_weight,
    )


def in_dtype(weights: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Weights in another dtype, all in one launch, and their gradients back in one."""
    if all(weight.dtype == dtype for weight in weights):
        return weights
    return list(_InDtype.apply(dtype, *weights))


class _InDtype(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.dtypes = [weight.dtype for weight in weights]
        return _copies(weights, [dtype] * len(weights))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_copies(grads, ctx.dtypes)


def _copies(tensors: tuple[Tensor, ...], dtypes: list[torch.dtype]) -> tuple[Tensor, ...]:
    pairs = zip(tensors, dtypes, strict=True)
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor, dtype in pairs]
    torch._foreach_copy_(copies, list(tensors))
    return tuple(copies)


class _Sequences(NamedTuple):
    """Rows of sequences that end in their candidates, which see what the history sees.

    Attributes:
        x: `[L, D]`.
        layers: of the stack.
        form: of the layers.
        spec: of the sequences.
        sequences: that the rows belong to.
        max_candidates: an upper bound of their candidates.
    """

    x: Tensor
    layers: list[LayerWeights]
    form: LayerForm
    spec: AttentionSpec
    sequences: RowSequences
    max_candidates: int

    def why_not(self) -> str | None:
        """Why the kernels cannot run it, or None."""
        operator = operators()["hstu_layer"]
        return operator.why_not("triton", self.x, self.layers[0], self.spec, self.form, None)

    def candidates(self) -> Tensor:
        """`[C, D]`."""
        return read_sequences(
            self.x,
            self.layers,
            self.spec,
            self.form,
            candidate_offsets=self.sequences.parts.candidate_offsets,
            candidate_rows=self.sequences.parts.candidate_rows(),
            max_candidates=self.max_candidates,
        )


class _Histories(NamedTuple):
    """Histories, and candidates that read them, each with its own weights.

    Attributes:
        history: `[T, D]`, contextual tokens too.
        rows: `[C, D]`, the candidates.
        layers: of the stack.
        form: of the layers.
        specs: of the histories, and of the candidates over them.
    """

    history: Tensor
    rows: Tensor
    layers: list[LayerWeights]
    form: LayerForm
    specs: tuple[AttentionSpec, AttentionSpec]

    def why_not(self) -> str | None:
        """Why the kernels cannot run it, or None."""
        tokens = self.history, self.rows
        return operators()["hstu_layer"].why_not(
            "triton", tokens, self.layers[0], self.specs, self.form,
            function="candidate_layer", last=False,
        )  # fmt: skip

    def candidates(self) -> Tensor:
        """`[C, D]`."""
        return read_histories(self.history, self.rows, self.layers, self.specs, self.form)


def _job(
    stack: Any, x: Tensor, sequences: RowSequences, step: StepAttention
) -> _Sequences | _Histories:
    """What one pass through the layers computes."""
    layers, form = layer_weights(stack, x.dtype), _form(stack, x)
    parts, mask = sequences.parts, step.candidates
    spec = AttentionSpec(
        offsets=parts.seq_offsets,
        max_length=sequences.max_length,
        alpha=stack._stu_layers[0]._attn_alpha,
        norm_length=sequences.max_length / step.norm_ratio,
        # A last token that no other follows is seen by nobody else anyway.
        num_targets=None if _most_candidates(sequences) <= 1 else sequences.num_targets,
        column_weights=step.column_weights,
        mask_position=step.mask_position,
        exact=True,
    )
    if mask is None:
        return _Sequences(x, layers, form, spec, sequences, _most_candidates(sequences))
    return _histories(x, layers, form, spec, sequences, mask)


def _histories(
    x: Tensor,
    layers: list[LayerWeights],
    form: LayerForm,
    spec: AttentionSpec,
    sequences: RowSequences,
    mask: CandidateRows,
) -> _Histories:
    parts = sequences.parts
    offsets = parts.seq_offsets - parts.candidate_offsets
    total = len(x) - parts.num_candidates
    # In front of the rows of a history lie the candidates of the users before.
    before = parts.candidate_offsets[:-1][segment_ids(offsets, total)]
    rows = torch.arange(total, device=x.device) + before
    weights = spec.column_weights
    spec = spec.replace(
        offsets=offsets,
        num_targets=None,
        column_weights=None if weights is None else weights[rows],
    )
    reading = spec.replace(
        causal=False,
        query_offsets=parts.candidate_offsets,
        max_query_length=mask.max_candidates,
        row_weights=row_weights(parts, mask.plan, spec.max_length),
        mask_position=mask.mask_position,
    )
    history = x.index_select(0, rows)
    candidates = x.index_select(0, sequences.parts.candidate_rows())
    return _Histories(history, candidates, layers, form, (spec, reading))


def _form(stack: Any, x: Tensor) -> LayerForm:
    layer = stack._stu_layers[0]
    rate = layer._output_dropout_ratio if layer.training else 0.0
    dropout = None
    if rate > 0.0:
        dropout = Dropout(rate, torch.randint(2**31 - 1, (1,), device=x.device))
    recompute = len(x) >= _MANY_ROWS and all(getattr(layer, name) for name in _RECOMPUTE)
    return LayerForm(layer._num_heads, dropout=dropout, recompute=recompute)


def _most_candidates(sequences: RowSequences) -> int:
    """An upper bound of the candidates of a sequence."""
    return 1 if sequences.one_target else sequences.max_targets


@functools.cache
def _say(message: str) -> None:
    """Log it once in this process."""
    logger.info(message)
