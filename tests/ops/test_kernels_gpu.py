"""The kernels as compiled, at real sizes, in half precision, and captured as graphs."""

import pytest
import torch
from torch import Tensor

from hpgr_plugin.ops.hstu_attention import (
    AttentionSpec,
    Places,
    PositionTimeBias,
    Visibility,
    hstu_attention,
)
from hpgr_plugin.ops.preference_plan import plan_preferences

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def offsets_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], device="cuda")


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 8e-3), (torch.float16, 2e-3), (torch.float32, 1e-4)]
)
@pytest.mark.parametrize("size", [32, 64, 128])
def test_attention_in_every_dtype(dtype: torch.dtype, tolerance: float, size: int) -> None:
    lengths = [0, 1, 700, 64, 129]
    offsets, total = offsets_of(lengths), sum(lengths)
    xs = [torch.randn(total, 4, size, device="cuda", dtype=dtype) for _ in range(3)]
    xs = [x.requires_grad_() for x in xs]
    exact = [x.detach().double().requires_grad_() for x in xs]
    form = {
        "offsets": offsets,
        "max_length": 700,
        "alpha": size**-0.5,
        "norm_length": 700.0,
        "column_weights": torch.rand(total, device="cuda"),
        "num_targets": torch.tensor([0, 1, 9, 1, 100], device="cuda"),
    }
    spec = AttentionSpec(**form)
    ours = hstu_attention(*xs, spec, backend="triton")
    reference = hstu_attention(*exact, spec, backend="torch")
    grad = torch.randn_like(ours)
    got = (ours, *torch.autograd.grad(ours, xs, grad))
    wanted = (reference, *torch.autograd.grad(reference, exact, grad.double()))
    for a, b in zip(got, wanted, strict=True):
        assert relative_error(a, b) < tolerance


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 1.5e-2), (torch.float16, 4e-3), (torch.float32, 1e-3)]
)
@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("mask_position", ["post", "pre"])
def test_attention_with_bias_orders_and_weights(
    dtype: torch.dtype, tolerance: float, size: int, mask_position: str
) -> None:
    """As the embedded ranker calls it: causal histories, candidates that see a part of them."""
    histories, counts = [0, 1, 400, 333, 64, 50], [3, 1, 64, 64, 0, 7]
    xs, spec, bias = ranking_case(histories, counts, size, dtype)
    spec = spec.replace(mask_position=mask_position)
    exact = [x.detach().double().requires_grad_() for x in (*xs, *bias[:2])]

    ours = hstu_attention(*xs, spec, bias=bias, backend="triton")

    exact_bias = PositionTimeBias(exact[3], exact[4], 16)
    reference = hstu_attention(*exact[:3], spec, bias=exact_bias, backend="torch")
    grad = torch.randn_like(ours)
    got = (ours, *torch.autograd.grad(ours, [*xs, *bias[:2]], grad))
    wanted = (reference, *torch.autograd.grad(reference, exact, grad.double()))
    for a, b in zip(got, wanted, strict=True):
        assert relative_error(a, b) < tolerance


def test_table_gradients_repeat_exactly() -> None:
    xs, spec, bias = ranking_case([400, 90, 0], [64, 64, 2], 64, torch.bfloat16)

    def gradients() -> tuple[Tensor, ...]:
        out = hstu_attention(*xs, spec, bias=bias, backend="triton")
        return torch.autograd.grad(out.float().square().sum(), [*xs, *bias[:2]])

    for a, b in zip(gradients(), gradients(), strict=True):
        assert torch.equal(a, b)


def ranking_case(
    histories: list[int], counts: list[int], size: int, dtype: torch.dtype
) -> tuple[list[Tensor], AttentionSpec, PositionTimeBias]:
    """Queries, keys and values of `[history | candidates]`, who sees whom, and a bias."""
    torch.manual_seed(0)
    lengths = [h + c for h, c in zip(histories, counts, strict=True)]
    total = sum(lengths)
    key, query, times = [], [], []
    for h, c in zip(histories, counts, strict=True):
        visible = torch.randint(0, h + 1, (c,))
        key += [torch.arange(h), torch.full((c,), 2**30)]
        query += [torch.arange(h), visible]
        past = torch.randint(0, 10**10, (h,)).sort().values
        times += [past, torch.randint(0, 10**10, (c,))]
    key, query, times = (torch.cat(parts).cuda() for parts in (key, query, times))
    xs = [torch.randn(total, 2, size, device="cuda", dtype=dtype).requires_grad_() for _ in "qkv"]
    spec = AttentionSpec(
        offsets=offsets_of(lengths),
        max_length=max(lengths),
        alpha=size**-0.5,
        norm_length=400.0,
        visibility=Visibility(key, query),
        places=Places(query + 1, times),
        row_weights=torch.rand(sum(counts), max(lengths), device="cuda"),
        weight_offsets=offsets_of(counts),
    )
    tables = [torch.randn(n, device="cuda").requires_grad_() for n in (64, 32)]
    return xs, spec, PositionTimeBias(*tables, 16)


def test_the_backward_repeats_exactly() -> None:
    offsets = offsets_of([300, 900])
    xs = [torch.randn(1200, 4, 64, device="cuda").bfloat16().requires_grad_() for _ in range(3)]

    def gradients() -> tuple[Tensor, ...]:
        spec = AttentionSpec(offsets=offsets, max_length=900, alpha=0.1, norm_length=900.0)
        out = hstu_attention(*xs, spec)
        return torch.autograd.grad(out.square().sum(), xs)

    for a, b in zip(gradients(), gradients(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("counts", [[1] * 5, [64, 0, 1, 3, 16]])
def test_plans_on_the_device_are_those_of_the_cpu(counts: list[int]) -> None:
    lengths = [0, 1, 40, 3000, 16384]
    history = torch.randint(-2, 3, (sum(lengths), 48), device="cuda").bfloat16()
    candidates = torch.randint(-2, 3, (sum(counts), 48), device="cuda").bfloat16()
    arguments = history, candidates, offsets_of(lengths), offsets_of(counts)
    settings = {"top_k": 32, "sigma": 2.0, "recent": 8}

    got = plan_preferences(*arguments, **settings)

    wanted = plan_preferences(*(x.cpu() for x in arguments), **settings)
    assert torch.equal(got.offsets.cpu(), wanted.offsets)
    assert torch.equal(got.index.cpu(), wanted.index)
    torch.testing.assert_close(got.weights.cpu(), wanted.weights)


def test_a_captured_stack_follows_its_inputs() -> None:
    from hpgr_plugin.components.hstu_stack import HSTUStack, graphed

    torch.manual_seed(0)
    stack = HSTUStack(embedding_dim=64, num_layers=3, num_heads=2, head_dim=32, norm_length=100)
    stack = stack.to("cuda", torch.bfloat16)
    captured = graphed(stack, 96, 3, 40)
    for lengths in ([30, 40, 26], [1, 5, 7]):
        offsets, used = offsets_of(lengths), sum(lengths)
        rows = torch.randn(96, 64, device="cuda").bfloat16()
        rows[used:] = 0.0
        rows.requires_grad_()
        weights = torch.rand(96, device="cuda")
        inputs = [rows, *stack.parameters()]
        ours = captured(rows, weights, offsets)
        got = [x.clone() for x in torch.autograd.grad(ours.square().sum(), inputs)]
        plain = stack(rows, weights, offsets, max_length=40, exact=False)
        wanted = torch.autograd.grad(plain.square().sum(), inputs)
        assert relative_error(ours, plain) < 1e-2
        for a, b in zip(got, wanted, strict=True):
            assert relative_error(a, b) < 2e-2
