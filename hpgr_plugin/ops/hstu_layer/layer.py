"""The weights of an HSTU layer, and its formula around any attention."""

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from hpgr_plugin.ops.hstu_attention.spec import AttentionSpec


class LayerWeights(NamedTuple):
    """Weights of a layer of width D with H heads of sizes dv (u, v) and d (q, k)."""

    norm_weight: Tensor  # [D]
    norm_bias: Tensor  # [D]
    projection_weight: Tensor  # [D, 2 H (dv + d)]: u, v, q, k
    projection_bias: Tensor  # [2 H (dv + d)]
    output_norm_weight: Tensor  # [H dv]
    output_norm_bias: Tensor  # [H dv]
    output_weight: Tensor  # [3 H dv, D]


class Attention(Protocol):
    """A backend of `hstu_attention`."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, /) -> Tensor: ...


class PlainLayers:
    """The functions of the operator as formulas.

    Args:
        attention: the backend of the attention.
    """

    def __init__(self, attention: Attention) -> None:
        self.attention = attention

    def hstu_layer(
        self, x: Tensor, weights: LayerWeights, spec: AttentionSpec, *, num_heads: int, eps: float
    ) -> Tensor:
        """See `hpgr_plugin.ops.hstu_layer.hstu_layer`."""
        u, v, q, k = _projections(x, weights, num_heads, eps)
        return x + _gated(u, self.attention(q, k, v, spec), weights, eps)

    def hstu_last_layer(
        self,
        x: Tensor,
        rows: Tensor,
        weights: LayerWeights,
        spec: AttentionSpec,
        *,
        num_heads: int,
        eps: float,
    ) -> Tensor:
        """See `hpgr_plugin.ops.hstu_layer.hstu_last_layer`."""
        u, v, q, k = _projections(x, weights, num_heads, eps)
        return x[rows] + _gated(u[rows], self.attention(q[rows], k, v, spec), weights, eps)

    def candidate_layer(
        self,
        history: Tensor,
        candidates: Tensor,
        weights: LayerWeights,
        spec: AttentionSpec,
        reading: AttentionSpec,
        *,
        num_heads: int,
        last: bool,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        """See `hpgr_plugin.ops.hstu_layer.candidate_layer`."""
        u, v, q, k = _projections(history, weights, num_heads, eps)
        own_u, own_v, own_q, own_k = _projections(candidates, weights, num_heads, eps)
        score = reading.alpha * (own_q * own_k).sum(-1, keepdim=True)
        own = F.silu(score) / reading.norm_length * own_v
        read = self.attention(own_q, k, v, reading) + own
        out = candidates + _gated(own_u, read, weights, eps)
        if last:
            return history, out
        return history + _gated(u, self.attention(q, k, v, spec), weights, eps), out


def _projections(
    x: Tensor, weights: LayerWeights, num_heads: int, eps: float
) -> tuple[Tensor, ...]:
    """u, v, q and k, `[T, H, size]` each."""
    normed = F.layer_norm(x, x.shape[1:], weights.norm_weight, weights.norm_bias, eps)
    projected = torch.addmm(weights.projection_bias, normed, weights.projection_weight)
    hidden = weights.output_norm_weight.numel()
    attention = projected.shape[1] // 2 - hidden
    parts = projected.split([hidden, hidden, attention, attention], dim=1)
    return tuple(part.unflatten(1, (num_heads, -1)) for part in parts)


def _gated(u: Tensor, attended: Tensor, weights: LayerWeights, eps: float) -> Tensor:
    u, attended = F.silu(u.flatten(1)), attended.flatten(1)
    normed = F.layer_norm(
        attended, attended.shape[1:], weights.output_norm_weight, weights.output_norm_bias, eps
    )
    return torch.cat([u, attended, u * normed], 1) @ weights.output_weight
