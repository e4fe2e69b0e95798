"""The preference plan (Eq. 5) as loops over candidates and items: the reference."""

import math

import torch
from torch import Tensor

from hpgr_plugin.ops.preference_plan.plan import PreferencePlan


def plan_preferences(
    history_embeddings: Tensor,
    candidate_embeddings: Tensor,
    history_offsets: Tensor,
    candidate_offsets: Tensor,
    top_k: int = 50,
    sigma: float = 2.0,
    eps: float = 1e-3,
    recent: int = 0,
    history_timestamps: Tensor | None = None,
    candidate_timestamps: Tensor | None = None,
) -> PreferencePlan:
    """Eq. 5 word for word: M_j = max_k exp(-(j - p_k)^2 / (2 sigma^2)), cut at M_j < eps."""
    index: list[int] = []
    weights: list[float] = []
    offsets = [0]
    for b in range(len(history_offsets) - 1):
        start, end = int(history_offsets[b]), int(history_offsets[b + 1])
        for c in range(int(candidate_offsets[b]), int(candidate_offsets[b + 1])):
            visible = [
                i
                for i in range(start, end)
                if history_timestamps is None
                or candidate_timestamps is None
                or bool(history_timestamps[i] < candidate_timestamps[c])
            ]
            score = {i: float(history_embeddings[i] @ candidate_embeddings[c]) for i in visible}
            anchors = sorted(visible, key=lambda i: (-score[i], -i))[:top_k]
            newest = visible[len(visible) - min(recent, len(visible)) :]
            for j in visible:
                mask = max(
                    (math.exp(-((j - p) ** 2) / (2.0 * sigma**2)) for p in anchors), default=0.0
                )
                mask = 1.0 if j in newest else mask
                if mask >= eps:
                    index.append(j)
                    weights.append(mask)
            offsets.append(len(index))
    double = history_embeddings.dtype == torch.float64
    return PreferencePlan(
        torch.tensor(index, dtype=torch.int64),
        torch.tensor(weights, dtype=torch.float64 if double else torch.float32),
        torch.tensor(offsets, dtype=torch.int64),
    )
