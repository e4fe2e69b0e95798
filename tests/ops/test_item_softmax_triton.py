"""The softmax kernel against its formula in torch: losses, hits and slopes."""

import pytest
import torch
from triton_device import DEVICE

from hpgr_plugin.ops.item_softmax import triton as softmax_triton
from hpgr_plugin.ops.item_softmax.torch import softmax_slope


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("size", [2, 16, 41, 200])
def test_the_kernel_equals_its_formula(
    size: int, with_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(softmax_triton, "_BLOCK", 64)  # several blocks a row, the last ragged
    scores = 5 * torch.randn(9, 2 * size, device=DEVICE)[:, :size].contiguous()
    scores[0] = 3.0  # all tie
    scores[1, -1] = 100.0
    scores[2] = -1e4 * torch.rand(size, device=DEVICE)
    targets = torch.randint(0, size, (9,), device=DEVICE)
    targets[1] = size - 1
    bias = torch.randn(size, device=DEVICE) if with_bias else None
    losses, hits, slope = softmax_slope(scores.clone(), targets, bias, with_slope=True)

    got = scores.clone()
    got_losses, got_hits, _ = softmax_triton.softmax_slope(got, targets, bias, with_slope=False)
    assert torch.equal(got, scores)
    torch.testing.assert_close(got_losses, losses)
    assert torch.equal(got_hits, hits)
    softmax_triton.softmax_slope(got, targets, bias, with_slope=True)
    torch.testing.assert_close(got, slope, rtol=1e-5, atol=1e-6)


def test_half_precision_is_rounded_as_it_is_written() -> None:
    scores = torch.randn(5, 300, device=DEVICE).bfloat16()
    targets = torch.arange(5, device=DEVICE)
    losses, _, slope = softmax_slope(scores, targets, None, with_slope=True)
    got_losses, _, _ = softmax_triton.softmax_slope(scores, targets, None, with_slope=True)
    torch.testing.assert_close(got_losses, losses)
    torch.testing.assert_close(scores.float(), slope, rtol=2**-7, atol=1e-6)


def test_no_rows() -> None:
    losses, hits, _ = softmax_triton.softmax_slope(
        torch.empty(0, 5, device=DEVICE), torch.empty(0, dtype=torch.int64, device=DEVICE), None,
        with_slope=True,
    )  # fmt: skip
    assert losses.shape == hits.shape == (0,)
