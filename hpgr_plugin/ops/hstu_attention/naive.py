"""HSTU attention as loops over sequences and rows that read like the formula: the reference.

Nothing here is meant to be fast. Every backend is checked against it, in value and in gradient.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from hpgr_plugin.ops.preference_plan.plan import PreferencePlan


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
    mask_position: Literal["post", "pre"] = "post",
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
        column_weights: `[T]`, one weight for a column in all rows: the sequence layout.
        pair_weights: B tensors `[n_b, n_b]`, a weight for every pair: the candidate layout.
        bias: B tensors `[n_b, n_b]` or `[H, n_b, n_b]`, added to the scores.
        num_targets: `[B]`; that many tokens at the end of each sequence never see each other.
        mask_position: "post" or "pre", where M enters.

    Returns:
        `[T, H, dv]`.

    Raises:
        ValueError: `mask_position` is something else.
    """
    if mask_position not in ("post", "pre"):
        raise ValueError(f"mask_position must be 'post' or 'pre', got {mask_position!r}")
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
            attention = F.silu(scores) * mask if mask_position == "post" else F.silu(mask * scores)
            outputs.append(torch.einsum("hj,jhd->hd", attention / norm_length, v[columns])[None])
    return torch.cat(outputs)


def candidate_scope_weights(
    plan: PreferencePlan, history_offsets: Tensor, candidate_offsets: Tensor
) -> list[Tensor]:
    """`pair_weights` of the candidate layout: M weighs the candidate's row alone.

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
