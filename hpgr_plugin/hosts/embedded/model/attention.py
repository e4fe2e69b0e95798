"""HSTU's pointwise attention on padded tensors, with PGSA's weights in either place.

``A = SiLU(alpha q.k + bias) / norm_length``, masked by visibility. PGSA multiplies ``A`` by M
(``mask_position="post"``, paper Eq. 5) or the scores before the activation
(``mask_position="pre"``).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def visibility(query_order: Tensor, key_order: Tensor, same_token: Tensor) -> Tensor:
    """``[B, Q, K]`` bool: row sees column (``key < query``, or it is the same token)."""
    return (key_order.unsqueeze(1) < query_order.unsqueeze(2)) | same_token


def pointwise_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None,
    visible: Tensor,
    weights: Tensor | None,
    alpha: float,
    norm_length: float,
    mask_position: str = "post",
) -> Tensor:
    """SiLU attention.

    Args:
        q: ``[B, H, Q, d]`` queries.
        k: ``[B, H, K, d]`` keys.
        v: ``[B, H, K, d]`` values.
        bias: ``[B, Q, K]`` added to the scaled scores, shared by the heads, or None.
        visible: ``[B, Q, K]`` bool.
        weights: ``[B, Q | 1, K]`` PGSA's M, or None for ones.
        alpha: score scale.
        norm_length: the ``n`` of ``1 / n``: that of the full sequence, also for a shortened one.
        mask_position: ``"post"`` or ``"pre"`` (the activation).

    Returns:
        ``[B, H, Q, d]``.
    """
    scores = torch.matmul(q * alpha, k.transpose(-1, -2))
    if bias is not None:
        scores = scores + bias.unsqueeze(1).to(scores.dtype)
    gain = visible.to(scores.dtype) / norm_length
    if weights is not None and mask_position == "post":
        gain = gain * weights.to(scores.dtype)
    elif weights is not None:
        scores = scores * weights.unsqueeze(1).to(scores.dtype)
    return torch.matmul(F.silu(scores) * gain.unsqueeze(1), v)
