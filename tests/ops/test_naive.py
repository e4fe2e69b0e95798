"""The ground truth against plain numbers and against the properties that define it."""

import pytest
import torch
from torch.nn import functional as F

from hpgr_plugin.components import naive as naive_components
from hpgr_plugin.ops.hstu_attention import naive as naive_attention

LENGTHS = [4, 0, 7, 1]


@pytest.fixture
def qkv():
    total = sum(LENGTHS)
    return (
        torch.randn(total, 2, 3, dtype=torch.float64),
        torch.randn(total, 2, 3, dtype=torch.float64),
        torch.randn(total, 2, 5, dtype=torch.float64),
    )


@pytest.fixture
def offsets(offsets_of):
    return offsets_of(LENGTHS)


def test_one_row_by_hand():
    q = k = torch.tensor([[[1.0]], [[2.0]]])
    v = torch.tensor([[[10.0]], [[100.0]]])
    got = naive_attention.hstu_attention(q, k, v, torch.tensor([0, 2]), alpha=0.5, norm_length=4)
    silu = [x / (1 + torch.tensor(-x).exp()) for x in (0.5, 1.0, 2.0)]
    want = torch.stack([silu[0] * 10 / 4, (silu[1] * 10 + silu[2] * 100) / 4])
    torch.testing.assert_close(got.flatten(), want)


@pytest.mark.parametrize("mask_position", ["post", "pre"])
def test_equals_the_matrix_form(qkv, offsets, mask_position):
    q, k, v = qkv
    weights = torch.rand(len(q), dtype=torch.float64)
    pairs = torch.rand(len(q), max(LENGTHS), dtype=torch.float64)
    got = naive_attention.hstu_attention(
        q, k, v, offsets, alpha=0.7, norm_length=9, mask_position=mask_position,
        column_weights=weights, row_weights=pairs,
    )  # fmt: skip
    want = []
    for b in range(len(LENGTHS)):
        rows = slice(int(offsets[b]), int(offsets[b + 1]))
        scores = 0.7 * torch.einsum("ihd,jhd->hij", q[rows], k[rows])
        mask = weights[rows] * pairs[rows, : LENGTHS[b]]
        attention = F.silu(scores) * mask if mask_position == "post" else F.silu(scores * mask)
        want.append(torch.einsum("hij,jhd->ihd", attention.tril() / 9, v[rows]))
    torch.testing.assert_close(got, torch.cat(want), rtol=1e-12, atol=1e-12)


def test_masking_scores_is_scaling_values(qkv, offsets):
    q, k, v = qkv
    weights = torch.rand(len(q), dtype=torch.float64)
    masked = naive_attention.hstu_attention(
        q, k, v, offsets, alpha=1.0, norm_length=7, column_weights=weights
    )
    scaled = naive_attention.hstu_attention(
        q, k, v * weights[:, None, None], offsets, alpha=1.0, norm_length=7
    )
    torch.testing.assert_close(masked, scaled, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mask_position", ["post", "pre"])
def test_a_column_of_weight_zero_reaches_no_row(qkv, offsets, mask_position):
    q, k, v = qkv
    weights = torch.rand(len(q), dtype=torch.float64)
    weights[6] = 0.0

    def run():
        return naive_attention.hstu_attention(
            q,
            k,
            v,
            offsets,
            alpha=1.0,
            norm_length=7,
            column_weights=weights,
            mask_position=mask_position,
        )

    before = run()
    k[6], v[6] = 1e3, 1e3
    assert torch.equal(run(), before)


def test_no_row_sees_what_comes_later(qkv, offsets):
    q, k, v = qkv
    before = naive_attention.hstu_attention(q, k, v, offsets, alpha=1.0, norm_length=7)
    k[7], v[7] = 50.0, 50.0  # the fourth token of the third sequence, rows 4..10
    after = naive_attention.hstu_attention(q, k, v, offsets, alpha=1.0, norm_length=7)
    changed = (before != after).flatten(1).any(1)
    assert changed.nonzero().flatten().tolist() == [7, 8, 9, 10]


def test_targets_never_see_each_other(qkv, offsets):
    q, k, v = qkv
    targets = torch.tensor([0, 0, 3, 1])
    before = naive_attention.hstu_attention(
        q, k, v, offsets, alpha=1.0, norm_length=7, num_targets=targets
    )
    k[8], v[8] = 50.0, 50.0  # the first of the three targets, rows 8, 9, 10
    after = naive_attention.hstu_attention(
        q, k, v, offsets, alpha=1.0, norm_length=7, num_targets=targets
    )
    assert (before != after).flatten(1).any(1).nonzero().flatten().tolist() == [8]


def test_mask_position_takes_two_values(qkv, offsets):
    with pytest.raises(ValueError, match="mask_position must be 'post' or 'pre', got 'both'"):
        naive_attention.hstu_attention(
            *qkv, offsets, alpha=1.0, norm_length=1, mask_position="both"
        )


def test_time_aware_index_by_hand(offsets_of):
    history, candidates = naive_components.time_aware_index(
        torch.tensor([10, 20, 20, 30]), offsets_of([4]), torch.tensor([20, 5, 99]), offsets_of([3])
    )
    assert candidates.tolist() == [2, 1, 5]
    assert history.view(3, 4).tolist() == [[1, 3, 4, 5], [2, 3, 4, 5], [1, 2, 3, 4]]


def test_stochastic_length_by_hand():
    assert naive_components.stochastic_length(8, 16, 1.5) == (8, 1.0)
    assert naive_components.stochastic_length(9, 16, 1.5) == (8, 64 / 81)
    assert naive_components.stochastic_length(16, 16, 1.5) == (8, 0.25)
    assert naive_components.stochastic_length(64, 64, 4 / 3)[0] == 16
    assert naive_components.stochastic_length(100, 100, 2.0) == (100, 1.0)
