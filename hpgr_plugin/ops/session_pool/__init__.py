"""SEM's two passes over the tokens: pool every session (Eq. 1), and add its context back."""

from torch import Tensor

from hpgr_plugin.ops.dispatch import triton_operator
from hpgr_plugin.ops.session_pool.pool import PooledSessions, PoolWeights, Spans, gather_spans

__all__ = [
    "PoolWeights",
    "PooledSessions",
    "Spans",
    "add_context",
    "gather_spans",
    "session_pool",
]

_OPERATOR = triton_operator(__name__)


def session_pool(
    tokens: Tensor,
    position: Tensor,
    cls: Tensor,
    weights: PoolWeights,
    spans: Spans,
    *,
    backend: str | None = None,
) -> PooledSessions:
    """What the [CLS] token of a pre-norm encoder layer reads in every session (Eq. 1).

    Session s is `[CLS]` followed by `x_i = tokens_i + position_i`. With y = LayerNorm(x), head h
    weights the y of the session, [CLS] among them, by the softmax of `q_h . y`, where
    `q_h = W_k^T (W_q y_CLS + b_q) / sqrt(d)`: a softmax does not see the bias of the keys, so their
    projection is taken to the query. The value projection follows once per session.

    Args:
        tokens: `[T, D]`.
        position: `[P, D]`, by place in the session; no session is longer than P.
        cls: `[D]`.
        weights: of the layer.
        spans: the S sessions; no token lies in two of them.
        backend: "triton", "torch" or "naive"; None: the fastest that can.

    Returns:
        The weighted means, in the dtype of the tokens.
    """
    pooled: PooledSessions = _OPERATOR(tokens, position, cls, weights, spans, backend=backend)
    return pooled


def add_context(
    tokens: Tensor, context: Tensor, gate: Tensor, offsets: Tensor, *, backend: str | None = None
) -> Tensor:
    """`h + gate * rms(h) * context_s` for the tokens h of every session s.

    Args:
        tokens: `[T, D]`; no gradient goes through rms(h).
        context: `[S, D]`.
        gate: `[D]`.
        offsets: int64 `[S + 1]`, of the sessions.
        backend: as in `session_pool`.

    Returns:
        `[T, D]`.
    """
    enhanced: Tensor = _OPERATOR.run("add_context", tokens, context, gate, offsets, backend=backend)
    return enhanced
