"""One HSTU layer in the host's layout: norm, projections, attention, gated output, residual."""

from torch import Tensor

from hpgr_plugin.ops.dispatch import Backend, Operator, triton_here
from hpgr_plugin.ops.hstu_attention.spec import AttentionSpec
from hpgr_plugin.ops.hstu_layer.layer import LayerWeights

__all__ = ["LayerWeights", "candidate_layer", "hstu_last_layer", "hstu_layer"]

_OPERATOR = Operator(
    "hstu_layer",
    Backend("triton", f"{__name__}.triton", here=triton_here),
    Backend("torch", f"{__name__}.torch"),
    Backend("naive", f"{__name__}.naive", automatic=False),
)


def hstu_layer(
    x: Tensor,
    weights: LayerWeights,
    spec: AttentionSpec,
    *,
    num_heads: int,
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    """All rows of one layer.

        u, v, q, k = norm(x) W + b
        a = attention(q, k, v)
        y = x + [SiLU(u), a, SiLU(u) * norm(a)] W_o

    Args:
        x: `[T, D]`.
        weights: of the layer.
        spec: the sequences and their column weights.
        num_heads: H.
        eps: of both norms.
        backend: "triton", "torch" or "naive"; None: the fastest that can.

    Returns:
        `[T, D]`.
    """
    output: Tensor = _OPERATOR(x, weights, spec, num_heads=num_heads, eps=eps, backend=backend)
    return output


def hstu_last_layer(
    x: Tensor,
    rows: Tensor,
    weights: LayerWeights,
    spec: AttentionSpec,
    *,
    num_heads: int,
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    """`hstu_layer` for some rows only: keys and values of all rows, the rest of those.

    Args:
        x: `[T, D]`.
        rows: `[R]` int64, no row twice: the last of every sequence, as many as
            `spec.query_offsets` says.
        weights, spec, num_heads, eps, backend: as in `hstu_layer`.

    Returns:
        `[R, D]`.
    """
    output: Tensor = _OPERATOR.run(
        "hstu_last_layer", x, rows, weights, spec, num_heads=num_heads, eps=eps, backend=backend
    )
    return output


def candidate_layer(
    history: Tensor,
    candidates: Tensor,
    weights: LayerWeights,
    spec: AttentionSpec,
    reading: AttentionSpec,
    *,
    num_heads: int,
    last: bool,
    eps: float = 1e-6,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One layer of the layout "shared_history": a dense history, and candidates that read it.

    Args:
        history: `[T, D]`.
        candidates: `[C, D]`: each reads the history, weighted by its own row, and itself.
        weights: of the layer.
        spec: of the history.
        reading: of the candidates over the history, not causal, with `row_weights`.
        num_heads: H.
        last: only the candidates are wanted; the history is returned as it was.
        eps: of both norms.
        backend: as in `hstu_layer`.

    Returns:
        The next history `[T, D]` and candidates `[C, D]`.
    """
    output: tuple[Tensor, Tensor] = _OPERATOR.run(
        "candidate_layer", history, candidates, weights, spec, reading,
        num_heads=num_heads, last=last, eps=eps, backend=backend,
    )  # fmt: skip
    return output
