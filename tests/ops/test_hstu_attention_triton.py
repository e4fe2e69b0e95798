"""The attention kernels, and the padded torch path, against the loops of naive.py."""

import warnings

import pytest
import torch
from torch import Tensor
from triton_device import DEVICE

from hpgr_plugin.ops.hstu_attention import naive as naive_attention
from hpgr_plugin.ops.hstu_attention.torch import hstu_attention
from hpgr_plugin.ops.hstu_attention.triton import Shape, attention_backward, attention_forward

LENGTHS = [0, 1, 40, 3]
TARGETS = [0, 1, 5, 3]
SETTINGS = {"alpha": 0.3, "norm_length": 50.0}


def offsets_of(lengths: list[int], dtype: torch.dtype = torch.int64) -> Tensor:
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return torch.tensor([0, *ends], dtype=dtype, device=DEVICE)


def inputs(rows: int, columns: int, size: int = 16, values: int = 16) -> list[Tensor]:
    shapes = ((rows, 2, size), (columns, 2, size), (columns, 2, values))
    return [torch.randn(s, device=DEVICE, requires_grad=True) for s in shapes]


def double(tensors: list[Tensor]) -> list[Tensor]:
    return [x.detach().double().requires_grad_() for x in tensors]


def assert_same(ours: Tensor, xs: list[Tensor], reference: Tensor, exact: list[Tensor]) -> None:
    grad = torch.randn_like(ours)
    got = (ours, *torch.autograd.grad(ours, xs, grad))
    wanted = (reference, *torch.autograd.grad(reference, exact, grad.double()))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernel", ["triton", "torch"])
@pytest.mark.parametrize(
    ("weighted", "mask_position", "targets"),
    [(False, "post", False), (True, "post", False), (True, "pre", True), (False, "post", True)],
)
def test_value_and_gradient_are_those_of_the_loops(
    kernel: str, weighted: bool, mask_position: str, targets: bool
) -> None:
    offsets = offsets_of(LENGTHS, torch.int32)
    xs = inputs(44, 44)
    exact = double(xs)
    weights = torch.rand(44, device=DEVICE) if weighted else None
    counts = torch.tensor(TARGETS, device=DEVICE) if targets else None
    more = {"column_weights": weights, "mask_position": mask_position, "num_targets": counts}

    ours = hstu_attention(*xs, offsets, max_length=40, kernel=kernel, **more, **SETTINGS)

    reference = naive_attention.hstu_attention(*exact, offsets, **more, **SETTINGS)
    assert_same(ours, xs, reference, exact)


@pytest.mark.parametrize("kernel", ["triton", "torch"])
@pytest.mark.parametrize("asked", [[0, 1, 1, 1], [0, 1, 23, 2]])
def test_the_last_rows_alone_equal_the_last_of_all(kernel: str, asked: list[int]) -> None:
    offsets, query_offsets = offsets_of(LENGTHS), offsets_of(asked)
    rows = [int(offsets[b + 1]) - count + i for b, count in enumerate(asked) for i in range(count)]
    xs = inputs(44, 44)
    exact = double(xs)
    weights = torch.rand(44, device=DEVICE)

    ours = hstu_attention(
        xs[0][rows], xs[1], xs[2], offsets, max_length=40, column_weights=weights,
        query_offsets=query_offsets, max_query_length=max(asked), kernel=kernel, **SETTINGS,
    )  # fmt: skip

    reference = naive_attention.hstu_attention(*exact, offsets, column_weights=weights, **SETTINGS)
    assert_same(ours, xs, reference[rows], exact)


@pytest.mark.parametrize("kernel", ["triton", "torch"])
def test_rows_that_no_sequence_owns_come_out_zero(kernel: str) -> None:
    xs = inputs(50, 50, size=16, values=32)

    ours = hstu_attention(*xs, offsets_of(LENGTHS), max_length=64, kernel=kernel, **SETTINGS)

    assert ours.shape == (50, 2, 32)
    assert not ours[44:].any()
    for gradient in torch.autograd.grad(ours.sum(), xs):
        assert not gradient[44:].any()


def test_slices_of_one_projection_need_no_copies_of_their_own() -> None:
    offsets = offsets_of([20, 7])
    projected = torch.randn(27, 3, 2, 16, device=DEVICE, requires_grad=True)
    exact = projected.detach().double().requires_grad_()

    ours = hstu_attention(*projected.unbind(1), offsets, max_length=20, kernel="triton", **SETTINGS)

    reference = naive_attention.hstu_attention(*exact.unbind(1), offsets, **SETTINGS)
    assert_same(ours, [projected], reference, [exact])


def test_queries_of_another_sequence_read_all_columns_by_their_own_weights() -> None:
    offsets, query_offsets = offsets_of([0, 40, 3]), offsets_of([2, 3, 0])
    q, k, v = inputs(5, 43)
    weights = torch.rand(5, 40, device=DEVICE)
    form = {"exact": True, "cross": True, "matrix": weights, **SETTINGS}
    shape = Shape(offsets, query_offsets, None, None, 40, 3, **form)
    output, grad = torch.empty_like(q), torch.randn_like(q)
    held = torch.randn_like(k), torch.randn_like(v)
    dq, dk, dv = torch.empty_like(q), held[0].clone(), held[1].clone()

    attention_forward(q.detach(), k.detach(), v.detach(), output, shape)
    attention_backward(grad, q.detach(), k.detach(), v.detach(), dq, dk, dv, shape, accumulate=True)

    exact = double([q, k, v])
    scores = 0.3 * torch.einsum("qhd,khd->qhk", exact[0][2:], exact[1][:40])
    attention = torch.nn.functional.silu(scores) * weights[2:, None] / 50.0
    reference = torch.einsum("qhk,khd->qhd", attention, exact[2][:40])
    wanted = torch.autograd.grad(reference, exact, grad[2:].double())
    torch.testing.assert_close(output[2:].double(), reference, rtol=1e-4, atol=1e-5)
    assert not output[:2].any()  # a history without items
    assert not dq[:2].any()
    got = (dq[2:], dk - held[0], dv - held[1])
    for a, b in zip(got, (wanted[0][2:], *wanted[1:]), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


def test_an_additive_bias_runs_in_torch_also_for_the_last_rows() -> None:
    offsets = offsets_of([5, 3])
    xs = inputs(8, 8)
    bias = torch.randn(1, 1, 5, 5, device=DEVICE, dtype=torch.float64)
    exact = double(xs)
    reference = naive_attention.hstu_attention(
        *exact, offsets, bias=[bias[0, 0], bias[0, 0, :3, :3]], **SETTINGS
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on CUDA it says why it does
        ours = hstu_attention(*exact, offsets, max_length=5, bias=bias, **SETTINGS)
        last = hstu_attention(
            exact[0][[4, 7]], *exact[1:], offsets, max_length=5, bias=bias,
            query_offsets=offsets_of([1, 1]), **SETTINGS,
        )  # fmt: skip
    torch.testing.assert_close(ours, reference)
    torch.testing.assert_close(last, reference[[4, 7]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel": "cuda"}, "kernel must be one of"),
        ({"mask_position": "both"}, "mask_position must be one of"),
        ({"column_weights": torch.ones(3)}, "column_weights must be"),
        ({"query_offsets": torch.zeros(2, dtype=torch.int64)}, "query_offsets must be"),
        ({"bias": torch.ones(1, 1, 9, 9), "kernel": "triton"}, "additive bias"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hstu_attention(*inputs(9, 9), offsets_of([4, 5]), max_length=9, **SETTINGS, **change)


def test_an_unknown_head_size_is_refused_by_the_kernels_alone() -> None:
    xs = inputs(9, 9, size=12, values=12)
    with pytest.raises(ValueError, match="head size of q and k is 12"):
        hstu_attention(*xs, offsets_of([4, 5]), max_length=5, kernel="triton", **SETTINGS)
    hstu_attention(*xs, offsets_of([4, 5]), max_length=5, kernel="torch", **SETTINGS)
