"""The softmax kernel against its formula in torch: losses, hits and slopes."""

import pytest
import torch
from triton_device import DEVICE

from hpgr_plugin.ops.item_softmax import triton as softmax_triton
from hpgr_plugin.ops.item_softmax.torch import TorchShardKernel, softmax_slope


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


@pytest.mark.parametrize("size", [0, 2, 41, 200])
def test_the_kernels_over_a_shard(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some targets are in other shards (-1), whose scores only the normaliser knows."""
    monkeypatch.setattr(softmax_triton, "_BLOCK", 64)
    scores = 5 * torch.randn(9, size, device=DEVICE)
    targets = torch.randint(-1, max(1, size), (9,), device=DEVICE) if size else torch.full((9,), -1)
    targets[0] = -1
    if size:
        scores[1, -1] = 100.0
        scores[2] = -1e4 * torch.rand(size, device=DEVICE)
    kernel, formula = softmax_triton.TritonShardKernel(), TorchShardKernel()
    found = kernel.statistics(scores.clone(), targets)
    wanted = formula.statistics(scores.clone(), targets)
    for got, want in zip(found[:3], wanted[:3], strict=True):
        torch.testing.assert_close(got, want)
    normaliser = torch.maximum(wanted.top + wanted.total.log(), torch.zeros(9, device=DEVICE)) + 1
    got, want = (k.slope(f, normaliser, targets) for k, f in ((kernel, found), (formula, wanted)))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
