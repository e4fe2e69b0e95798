"""HSTU attention over jagged sequences: one operator, several backends.

HSTU attention is pointwise, without a softmax over the row:

    s_ij = alpha q_i . k_j + b_ij
    o_i  = sum_j A'_ij / n * v_j,   A' = SiLU(s) * M ("post")  or  SiLU(M * s) ("pre")
"""

from torch import Tensor

from hpgr_plugin.ops.dispatch import triton_operator
from hpgr_plugin.ops.hstu_attention.spec import (
    AttentionSpec,
    MaskPosition,
    Places,
    PositionTimeBias,
    Visibility,
)

__all__ = [
    "AttentionSpec",
    "MaskPosition",
    "Places",
    "PositionTimeBias",
    "Visibility",
    "attention_backend",
    "hstu_attention",
]

_OPERATOR = triton_operator(__name__)


def attention_backend(heads: Tensor) -> str:
    """The backend that attention takes for queries, keys and values like these.

    Args:
        heads: `[T, H, d]`, for its device, dtype and sizes; T may be 0.
    """
    spec = AttentionSpec(
        offsets=heads.new_zeros(1).long(),
        max_length=0,
        alpha=1.0,
        norm_length=1.0,
    )
    return _OPERATOR.chosen(heads, heads, heads, spec)


def hstu_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: AttentionSpec,
    *,
    bias: PositionTimeBias | None = None,
    backend: str | None = None,
) -> Tensor:
    """HSTU attention; see the module for the formula and `AttentionSpec` for who sees whom.

    Args:
        q: queries `[T, H, d]`, or `[Tq, H, d]` with `spec.query_offsets`.
        k: keys `[T, H, d]`.
        v: values `[T, H, dv]`.
        spec: sequences, visibility and weights.
        bias: b of this layer; needs `spec.places`.
        backend: "triton", "torch" or "naive"; None: the fastest that can.

    Returns:
        `[T, H, dv]` or `[Tq, H, dv]`; rows beyond the last sequence are zero.

    Raises:
        ValueError: shapes that do not fit, or a named backend that cannot run this.
    """
    spec.check(q, k, v, bias)
    output: Tensor = _OPERATOR(q, k, v, spec, bias=bias, backend=backend)
    return output
