"""The host's STU layers on this package's kernels, with the host's own parameters.

The parameters stay the host's objects, so checkpoints, optimizers and gradients stay what they are.
The last layer computes only the candidates: nothing in the host's ranking model reads its other
rows.
"""

from __future__ import annotations

import logging
import operator
from typing import Any, Literal

import torch
from generative_recommenders.common import HammerKernel
from generative_recommenders.modules.stu import STULayer, STUStack
from torch import Tensor, nn

from hpgr_plugin.components.capture_checks import has_hooks
from hpgr_plugin.components.hstu_stack import read_histories, read_sequences
from hpgr_plugin.errors import HpgrError
from hpgr_plugin.hosts.dlrm_v3.attention import (
    KERNEL_SIZES,
    CandidateRows,
    PreferenceSTULayer,
    RowSequences,
    StepAttention,
)
from hpgr_plugin.log_once import log_once
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
_options_of = operator.attrgetter(*_OPTIONS)
_equal_of = operator.attrgetter(*_EQUAL)
_SUPPORTED = tuple(supported for supported, _ in _OPTIONS.values())
_RECOMPUTE = ("_recompute_normed_x", "_recompute_uvqk", "_recompute_y")
# Below so many rows what is kept for the backward is little, and launches are what costs.
_MANY_ROWS = 1 << 14


class FusedLayers:
    """Runs a stack of the host's layers as one.

    Args:
        stack: The host's, of the model that is being built; looked at, not kept.
        choice: "fused", "host", or None: fused where the Triton kernels can run the step, else the
            host's layers; the log says once which it is.
        binding: The name of the choice in an error.

    Raises:
        HpgrError: "fused" with an option of the host that is not supported.
    """

    def __init__(self, stack: nn.Module, choice: Layers | None, *, binding: str) -> None:
        self._choice = choice
        self._binding = binding
        unsupported = unsupported_option(stack)
        if choice == "fused" and unsupported is not None:
            raise self._error(f"does not support {unsupported}")

    def run(
        self, stack: Any, x: Tensor, sequences: RowSequences, step: StepAttention
    ) -> Tensor | None:
        """The candidates `[C, D]` in their order, or None: the host's own layers have to run.

        Args:
            stack: The host's, of the model.
            x: `[L, D]`.
            sequences: That the rows belong to.
            step: What a plan changes in their attention.

        Raises:
            HpgrError: "fused" was chosen, and the kernels cannot run this step on its device.
        """
        if self._choice == "host" or torch.jit.is_tracing():
            return None
        reason = unsupported_option(stack)
        if reason is None and self._choice is None:
            reason = _why_slower(stack, x.device)
        if reason is None and x.is_cuda:
            reason = _why_not(stack, x, sequences, step)
        if reason is None:
            log_once(
                logger, "the STU layers run on this package's kernels, with the host's weights"
            )
            with torch.autocast(x.device.type, enabled=False):
                return self._candidates(stack, x.contiguous(), sequences, step)
        if self._choice == "fused":
            raise self._error(f"cannot run this step: {reason}")
        log_once(logger, f"the STU layers run on the host's kernels: {reason}")
        return None

    def expected(self, stack: Any, device: torch.device) -> bool:
        """Whether the layers will run fused on CUDA, as far as is known before a step."""
        if self._choice == "host" or device.type != "cuda" or unsupported_option(stack):
            return False
        sizes = stack._stu_layers[0]._attention_dim, stack._stu_layers[0]._hidden_dim
        on_kernels = backend_choices().get("hstu_layer", "triton") == "triton"
        on_kernels = on_kernels and all(size in KERNEL_SIZES for size in sizes)
        return on_kernels and (self._choice == "fused" or _why_slower(stack, device) is None)

    def _candidates(
        self, stack: Any, x: Tensor, sequences: RowSequences, step: StepAttention
    ) -> Tensor:
        spec, form = _spec(stack, sequences, step), _form(stack, x)
        layers = layer_weights(stack, x.dtype)
        if step.candidates is not None:
            return _over_histories(x, layers, form, spec, step.candidates)
        return read_sequences(
            x,
            layers,
            spec,
            form,
            candidate_offsets=sequences.parts.candidate_offsets,
            candidate_rows=sequences.parts.candidate_rows(),
            max_candidates=_most_candidates(sequences),
        )

    def _error(self, reason: str) -> HpgrError:
        return HpgrError(
            f'{self._binding} = "fused" {reason}; bind {self._binding} = "host", or None for the '
            "host's layers where they are needed"
        )


def _why_slower(stack: Any, device: torch.device) -> str | None:
    """Why the host's layers are the faster ones for rows on this device, or None."""
    if device.type != "cuda":
        return "the rows are not on a CUDA device"
    kernel = stack.hammer_kernel()
    if kernel != HammerKernel.TRITON:
        return f"the host was told to use {kernel.value}"
    return None


def _why_not(stack: Any, x: Tensor, sequences: RowSequences, step: StepAttention) -> str | None:
    """Why the Triton kernels cannot run the step, or None."""
    operator = operators()["hstu_layer"]
    layer = stack._stu_layers[0]
    spec, form, weights = (
        _spec(stack, sequences, step),
        LayerForm(layer._num_heads),
        _parameters(layer),
    )
    if step.candidates is None:
        return operator.why_not("triton", x, weights, spec, form, None)
    reading = spec.replace(
        causal=False, row_weights=x.new_empty(0, 0), mask_position=step.candidates.mask_position
    )
    return operator.why_not(
        "triton", (x, x), weights, (spec, reading), form, function="candidate_layer", last=False
    )


def unsupported_option(stack: Any) -> str | None:
    """The first option of the host's layers that the kernels do not have, or None."""
    if type(stack) is not STUStack or not len(stack._stu_layers):
        return f"a {type(stack).__name__} in place of a stack of layers"
    if has_hooks(stack):
        return "hooks on the stack of layers"
    for layer in stack._stu_layers:
        if type(layer) not in (STULayer, PreferenceSTULayer):
            return f"layers of class {type(layer).__name__}"
        if has_hooks(layer):
            return "hooks on a layer"
        if _options_of(layer) != _SUPPORTED:
            pairs = zip(_OPTIONS.values(), _options_of(layer), strict=True)
            return next(otherwise for (wanted, otherwise), is_ in pairs if is_ != wanted)
    values = {_equal_of(layer) for layer in stack._stu_layers}
    if len(values) == 1:
        return None
    differing = zip(_EQUAL, zip(*values, strict=True), strict=True)
    name = next(name for name, of_layers in differing if len(set(of_layers)) > 1)
    return f"layers that differ in {name.lstrip('_')}"


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


def _spec(stack: Any, sequences: RowSequences, step: StepAttention) -> AttentionSpec:
    """The attention of the sequences."""
    return AttentionSpec(
        offsets=sequences.parts.seq_offsets,
        max_length=sequences.max_length,
        alpha=stack._stu_layers[0]._attn_alpha,
        norm_length=sequences.max_length / step.norm_ratio,
        # A last token that no other follows is seen by nobody else anyway.
        num_targets=None if _most_candidates(sequences) <= 1 else sequences.num_targets,
        column_weights=step.column_weights,
        mask_position=step.mask_position,
        exact=True,
    )


def _over_histories(
    x: Tensor,
    layers: list[LayerWeights],
    form: LayerForm,
    spec: AttentionSpec,
    mask: CandidateRows,
) -> Tensor:
    """Candidates `[C, D]` that read their histories each with its own weights."""
    parts = mask.parts
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
    candidates = x.index_select(0, parts.candidate_rows())
    return read_histories(history, candidates, layers, (spec, reading), form)


def _form(stack: Any, x: Tensor) -> LayerForm:
    """Dropout of this step, with a new seed, and what is computed again."""
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
