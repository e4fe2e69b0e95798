"""One HSTU layer in the host's layout: norm, projections, attention, gated output, residual."""

from torch import Tensor

from hpgr_plugin.ops.dispatch import triton_operator
from hpgr_plugin.ops.hstu_attention.spec import AttentionSpec
from hpgr_plugin.ops.hstu_layer.layer import Dropout, LayerForm, LayerWeights, Specs, Tokens

__all__ = ["Dropout", "LayerForm", "LayerWeights", "candidate_layer", "hstu_layer"]

_OPERATOR = triton_operator(__name__)


def hstu_layer(
    x: Tensor,
    weights: LayerWeights,
    spec: AttentionSpec,
    form: LayerForm,
    *,
    rows: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """One layer.

        u, v, q, k = norm(x) W + b
        a = attention(q, k, v)
        y = x + dropout([SiLU(u), a, SiLU(u) * norm(a)]) W_o

    Args:
        x: `[T, D]`.
        weights: of the layer.
        spec: the sequences and their column weights.
        form: heads, eps, dropout and what is kept for the backward.
        rows: int64 `[R]`, the only rows of y that are wanted, none twice: the last of every
            sequence, as many as `spec.query_offsets` says. None: all rows.
        backend: "triton", "torch" or "naive"; None: the fastest that can.

    Returns:
        y `[T, D]`, or `[R, D]`.
    """
    output: Tensor = _OPERATOR(x, weights, spec, form, rows, backend=backend)
    return output


def candidate_layer(
    tokens: Tokens,
    weights: LayerWeights,
    specs: Specs,
    form: LayerForm,
    *,
    last: bool,
    backend: str | None = None,
) -> Tokens:
    """One layer of the layout "shared_history": a dense history, and candidates that read it.

    Args:
        tokens: history `[T, D]`, and candidates `[C, D]`: each reads the history, weighted by its
            own row, and itself.
        weights: of the layer.
        specs: of the history, and of the candidates over the history: not causal, with
            `row_weights`, and with the column weights of the history if it has any.
        form: heads, eps, dropout and what is kept for the backward.
        last: only the candidates are wanted; the history is returned as it was.
        backend: as in `hstu_layer`.

    Returns:
        The next history and candidates.
    """
    arguments = tokens, weights, specs, form
    output: Tokens = _OPERATOR.run("candidate_layer", *arguments, last=last, backend=backend)
    return output
