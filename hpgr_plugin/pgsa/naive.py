"""The ground truth: loops over users, candidates and rows that read like the formulas.

Nothing here is meant to be fast. Every fast path is held against these functions, in value and
in gradient, preferably in float64.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from hpgr_plugin.pgsa.preferences import PreferencePlan


def hstu_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    *,
    alpha: float,
    norm_length: float,
    column_weights: Tensor | None = None,
    pair_weights: Sequence[Tensor] | None = None,
    bias: Sequence[Tensor] | None = None,
    num_targets: Tensor | None = None,
    apply: Literal["post", "pre"] = "post",
) -> Tensor:
    """Dense causal HSTU attention, with the preference mask M on its scores.

        s_ij = alpha * q_i . k_j + b_ij
        o_i  = sum_{j <= i} A'_ij / n * v_j,   A' = SiLU(s) * M (post)  or  SiLU(M * s) (pre)

    M_ij is column_weights_j times pair_weights_ij, each 1 where not given. With M_ij = 0, row i
    does not see column j in either form.

    Args:
        q, k: `[T, H, d]`.
        v: `[T, H, dv]`.
        offsets: `[B + 1]`.
        alpha: factor of the scores.
        norm_length: n, the length of the full sequence (or the host's constant in its place).
        column_weights: `[T]`, one weight for a column in all rows: the sequence scope.
        pair_weights: B tensors `[n_b, n_b]`, a weight for every pair: the candidate scope.
        bias: B tensors `[n_b, n_b]` or `[H, n_b, n_b]`, added to the scores.
        num_targets: `[B]`; that many tokens at the end of each sequence never see each other.
        apply: "post" or "pre", where M enters.

    Returns:
        `[T, H, dv]`.

    Raises:
        ValueError: `apply` is something else.
    """
    if apply not in ("post", "pre"):
        raise ValueError(f"apply must be 'post' or 'pre', got {apply!r}")
    outputs = [v.new_zeros(0, *v.shape[1:])]
    for b in range(len(offsets) - 1):
        start, end = int(offsets[b]), int(offsets[b + 1])
        targets = 0 if num_targets is None else int(num_targets[b])
        first_target = end - start - targets
        for i in range(end - start):
            # Row i sees the history up to itself; a target sees the history and itself.
            seen = [j for j in range(i + 1) if j < first_target or j == i]
            columns = [start + j for j in seen]
            scores = alpha * torch.einsum("hd,jhd->hj", q[start + i], k[columns])
            if bias is not None:
                scores = scores + bias[b][..., i, seen]
            mask = scores.new_ones(len(seen))
            if column_weights is not None:
                mask = mask * column_weights[columns]
            if pair_weights is not None:
                mask = mask * pair_weights[b][i, seen]
            attention = F.silu(scores) * mask if apply == "post" else F.silu(mask * scores)
            outputs.append(torch.einsum("hj,jhd->hd", attention / norm_length, v[columns])[None])
    return torch.cat(outputs)


def candidate_scope_weights(
    plan: PreferencePlan, history_offsets: Tensor, candidate_offsets: Tensor
) -> list[Tensor]:
    """`pair_weights` of the candidate scope: M weighs the candidate's row alone.

    Sequence b is the history of user b followed by its candidates, `[n_b, n_b]` with
    n_b = N_b + C_b. History rows are all ones; a candidate's row has its plan over the history
    and 1 in its own column.
    """
    matrices = []
    for b in range(len(history_offsets) - 1):
        start, length = int(history_offsets[b]), int(history_offsets[b + 1] - history_offsets[b])
        candidates = range(int(candidate_offsets[b]), int(candidate_offsets[b + 1]))
        matrix = plan.weights.new_ones(length + len(candidates), length + len(candidates))
        for row, c in enumerate(candidates, start=length):
            kept = slice(int(plan.offsets[c]), int(plan.offsets[c + 1]))
            matrix[row, :length] = 0.0
            matrix[row, plan.index[kept] - start] = plan.weights[kept]
        matrices.append(matrix)
    return matrices


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


def time_aware_index(
    history_timestamps: Tensor,
    history_offsets: Tensor,
    candidate_timestamps: Tensor,
    candidate_offsets: Tensor,
) -> tuple[Tensor, Tensor]:
    """Eq. 4: each candidate inserted alone into its user's history, numbered 1..N+1.

    Returns:
        `history_index [sum over candidates of N_b]` and `candidate_index [C]`, int64.
    """
    history_index: list[int] = []
    candidate_index: list[int] = []
    for b in range(len(history_offsets) - 1):
        times = history_timestamps[int(history_offsets[b]) : int(history_offsets[b + 1])].tolist()
        for c in range(int(candidate_offsets[b]), int(candidate_offsets[b + 1])):
            place = 1 + sum(time < int(candidate_timestamps[c]) for time in times)
            numbers = [number for number in range(1, len(times) + 2) if number != place]
            history_index += numbers
            candidate_index.append(place)
    return (
        torch.tensor(history_index, dtype=torch.int64),
        torch.tensor(candidate_index, dtype=torch.int64),
    )


def stochastic_length(length: int, max_history: int, alpha: float) -> tuple[int, float]:
    """HSTU's Eq. 4: how many items a shortened history keeps, and how often it stays whole.

    Returns:
        `(kept, probability)`: a history longer than kept = floor(N_c^(alpha / 2)) stays whole
        with probability min(1, N_c^alpha / n^2); a history up to that length always does.
    """
    kept = math.floor(round(max_history ** (alpha / 2.0), 9))  # 64^(2/3) is 15.999... in floats
    if length <= kept:
        return kept, 1.0
    return kept, min(1.0, max_history**alpha / length**2)
