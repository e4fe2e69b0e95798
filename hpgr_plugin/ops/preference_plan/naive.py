"""The preference plan (Eq. 5) as loops over candidates and items: the reference."""

import math

import torch
from torch import Tensor

from hpgr_plugin.ops.preference_plan.plan import (
    PlanInputs,
    PlanSettings,
    PlanTimes,
    PreferencePlan,
)


def plan_preferences(inputs: PlanInputs, settings: PlanSettings) -> PreferencePlan:
    """Eq. 5 word for word: M_j = max_k exp(-(j - p_k)^2 / (2 sigma^2)), cut at M_j < eps."""
    history, candidates = inputs.history_embeddings, inputs.candidate_embeddings
    history_times, candidate_times = inputs.history_timestamps, inputs.candidate_timestamps
    top_k, sigma, eps, recent = settings
    index: list[int] = []
    weights: list[float] = []
    offsets = [0]
    for b in range(len(inputs.history_offsets) - 1):
        start, end = inputs.history_offsets[b : b + 2].tolist()
        for c in range(*inputs.candidate_offsets[b : b + 2].tolist()):
            visible = list(range(start, end))
            if history_times is not None and candidate_times is not None:
                visible = [i for i in visible if bool(history_times[i] < candidate_times[c])]
            score = {i: float(history[i] @ candidates[c]) for i in visible}
            anchors = sorted(visible, key=lambda i: (-score[i], -i))[:top_k]
            newest = visible[max(0, len(visible) - recent) :]
            for j in visible:
                mask = max(
                    (math.exp(-((j - p) ** 2) / (2.0 * sigma**2)) for p in anchors), default=0.0
                )
                mask = 1.0 if j in newest else mask
                if mask >= eps:
                    index.append(j)
                    weights.append(mask)
            offsets.append(len(index))
    dtype = torch.float64 if history.dtype == torch.float64 else torch.float32
    return PreferencePlan(
        torch.tensor(index, dtype=torch.int64, device=history.device),
        torch.tensor(weights, dtype=dtype, device=history.device),
        torch.tensor(offsets, dtype=torch.int64, device=history.device),
    )


def count_earlier(times: PlanTimes) -> Tensor:
    """Eq. 4 word for word: the number of items with t_i < t_C."""
    counts = torch.zeros(len(times.candidates), dtype=torch.int64)
    for b in range(len(times.history_offsets) - 1):
        start, end = times.history_offsets[b : b + 2].tolist()
        for c in range(*times.candidate_offsets[b : b + 2].tolist()):
            counts[c] = int((times.history[start:end] < times.candidates[c]).sum())
    return counts.to(times.history.device)
