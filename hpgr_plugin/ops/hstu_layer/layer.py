"""The weights of an HSTU layer, and its formula around any attention."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from hpgr_plugin.ops.hstu_attention.spec import AttentionSpec

Tokens = tuple[Tensor, Tensor]  # history [T, D] and candidates [C, D]
Specs = tuple[AttentionSpec, AttentionSpec]  # of the history, and of candidates over it


class LayerWeights(NamedTuple):
    """Weights of a layer of width D with H heads of sizes dv (u, v) and d (q, k).

    Those of the norms may have another dtype than the rows, the others have that of the rows.
    """

    norm_weight: Tensor  # [D]
    norm_bias: Tensor  # [D]
    projection_weight: Tensor  # [D, 2 H (dv + d)]: u, v, q, k
    projection_bias: Tensor  # [2 H (dv + d)]
    output_norm_weight: Tensor  # [H dv]
    output_norm_bias: Tensor  # [H dv]
    output_weight: Tensor  # [3 H dv, D]


class Dropout(NamedTuple):
    """Dropout of the gated output, in training.

    Attributes:
        rate: share of its numbers that become zero, below 1.
        seed: int64 `[1]`, drawn once per step on the device of the rows. The kernels make their
            masks from it; the other backends draw from torch's own generator.
        draw: which mask of the step: layers count by two.
    """

    rate: float
    seed: Tensor
    draw: int = 0


class LayerForm(NamedTuple):
    """What is no weight of a layer.

    Attributes:
        num_heads: H.
        eps: of both norms.
        dropout: None for none.
        recompute: keep less for the backward: projections and gated output are computed again.
    """

    num_heads: int
    eps: float = 1e-6
    dropout: Dropout | None = None
    recompute: bool = False

    def with_draw(self, draw: int) -> LayerForm:
        """The form with another mask of its dropout."""
        if self.dropout is None:
            return self
        return self._replace(dropout=self.dropout._replace(draw=draw))


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
        self, x: Tensor, weights: LayerWeights, spec: AttentionSpec, form: LayerForm,
        rows: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """See `hpgr_plugin.ops.hstu_layer.hstu_layer`."""
        u, v, q, k = _projections(x, weights, form)
        if rows is not None:
            x, u, q = x[rows], u[rows], q[rows]
        return x + _gated(u, self.attention(q, k, v, spec), weights, form)

    def candidate_layer(
        self, tokens: Tokens, weights: LayerWeights, specs: Specs, form: LayerForm, *, last: bool
    ) -> Tokens:
        """See `hpgr_plugin.ops.hstu_layer.candidate_layer`."""
        (history, candidates), (spec, reading) = tokens, specs
        u, v, q, k = _projections(history, weights, form)
        own_u, own_v, own_q, own_k = _projections(candidates, weights, form)
        score = reading.alpha * (own_q * own_k).sum(-1, keepdim=True)
        own = F.silu(score) / reading.norm_length * own_v
        read = self.attention(own_q, k, v, reading) + own
        out = candidates + _gated(own_u, read, weights, form)
        if last:
            return history, out
        return history + _gated(u, self.attention(q, k, v, spec), weights, form), out


def _projections(x: Tensor, weights: LayerWeights, form: LayerForm) -> tuple[Tensor, ...]:
    """u, v, q and k, `[T, H, size]` each."""
    normed = _norm(x, weights.norm_weight, weights.norm_bias, form.eps)
    projected = torch.addmm(weights.projection_bias, normed, weights.projection_weight)
    hidden = weights.output_norm_weight.numel()
    attention = projected.shape[1] // 2 - hidden
    parts = projected.split([hidden, hidden, attention, attention], dim=1)
    return tuple(part.unflatten(1, (form.num_heads, -1)) for part in parts)


def _gated(u: Tensor, attended: Tensor, weights: LayerWeights, form: LayerForm) -> Tensor:
    u, attended = F.silu(u.flatten(1)), attended.flatten(1)
    normed = _norm(attended, weights.output_norm_weight, weights.output_norm_bias, form.eps)
    gated = torch.cat([u, attended, u * normed], 1)
    if form.dropout is not None:
        gated = F.dropout(gated, form.dropout.rate)
    return gated @ weights.output_weight


def _norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[1:], weight.to(x.dtype), bias.to(x.dtype), eps)
