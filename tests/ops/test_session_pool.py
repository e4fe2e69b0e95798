"""SEM on kernels against SEM in plain torch, value and every gradient, on ragged sessions."""

import copy
from collections.abc import Callable

import pytest
import torch
from triton_device import DEVICE

from hpgr_plugin.components.sem import SessionEnhancementModule
from hpgr_plugin.ops.session_pool import PoolWeights, Spans
from hpgr_plugin.ops.session_pool import triton as pool_triton

LENGTHS = [0, 1, 40, 0, 55, 2, 9]


def histories() -> tuple[torch.Tensor, torch.Tensor]:
    offsets = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], device=DEVICE)
    # Sessions of one token to several tiles of the kernel.
    gaps = torch.where(torch.rand(sum(LENGTHS)) < 0.06, 3600, 60)
    gaps[60:66] = 3600
    return offsets, gaps.cumsum(0).to(DEVICE)


def run(module: SessionEnhancementModule, *inputs: torch.Tensor) -> list[torch.Tensor]:
    embeddings, offsets, times, grad = inputs
    x = embeddings.clone().requires_grad_()
    out = module(x, offsets, times)
    return [out, *torch.autograd.grad(out, (x, *module.parameters()), grad)]


@pytest.mark.parametrize("caps", [(100, 50), (20, 3)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize(("size", "num_heads"), [(24, 3), (32, 1)])
def test_kernels_are_plain_torch(
    size: int,
    num_heads: int,
    pooling: str,
    causal: bool,
    caps: tuple[int, int],
    use_backends: Callable[..., None],
) -> None:
    module = SessionEnhancementModule(
        embedding_dim=size, num_heads=num_heads, pooling=pooling, causal=causal,
        max_session_length=caps[0], max_sessions=caps[1],
    )  # fmt: skip
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    module = module.to(DEVICE)
    offsets, times = histories()
    total = sum(LENGTHS)
    inputs = torch.randn(total, size, device=DEVICE), offsets, times
    grad = torch.randn(total, size, device=DEVICE)
    use_backends(session_pool="torch")
    wanted = run(copy.deepcopy(module).double(), inputs[0].double(), offsets, times, grad.double())
    use_backends(session_pool="triton")
    got = run(module, *inputs, grad)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_no_user_has_a_history(backend: str, use_backends: Callable[..., None]) -> None:
    use_backends(session_pool=backend)
    module = SessionEnhancementModule(embedding_dim=16, num_heads=2).to(DEVICE)
    none = torch.empty(0, 16, device=DEVICE, requires_grad=True)
    out = module(none, torch.zeros(3, dtype=torch.int64, device=DEVICE),
                 torch.empty(0, dtype=torch.int64, device=DEVICE))  # fmt: skip
    out.sum().backward()
    assert out.shape == (0, 16)
    assert torch.equal(module.session_cls.grad, torch.zeros_like(module.session_cls))


def test_cases_without_a_kernel_have_a_reason() -> None:
    def reason(size: int, num_heads: int, dtype: torch.dtype = torch.float32) -> str | None:
        x = torch.empty(1, size, dtype=dtype)
        heads = x.new_empty(num_heads, size // num_heads, size)
        weights = PoolWeights(x[0], x[0], heads, heads[:, :, 0], heads)
        spans = Spans(torch.tensor([0]), torch.tensor([1]))
        return pool_triton.why_not_session_pool(x, x, x[0], weights, spans)

    assert reason(256, 4) is None
    assert reason(512, 4, torch.bfloat16) is None
    assert "float64" in str(reason(8, 1, torch.float64))
    assert "512, more than 256 in torch.float32" in str(reason(512, 4))
    assert "32 heads" in str(reason(64, 32))
