"""Layers over padded sequences, and as CUDA graphs, against the same layers launch by launch."""

import copy

import pytest
import torch
from torch import Tensor

from hpgr_plugin.components.captured_stack import (
    CapturedStack,
    Inputs,
    PaddedPass,
    padded_size,
    weight_buffers,
)
from hpgr_plugin.components.hstu_stack import HSTUStack, read_sequences
from hpgr_plugin.ops.hstu_attention import AttentionSpec
from hpgr_plugin.ops.hstu_layer import Dropout, LayerForm, LayerWeights

WIDTH, HEADS, ALPHA, NORM_LENGTH = 64, 2, 0.3, 70.0
FORM = LayerForm(HEADS)
GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def new_parameters(num_layers: int = 3, **form: object) -> list[Tensor]:
    torch.manual_seed(0)
    stack = HSTUStack(
        embedding_dim=WIDTH, num_layers=num_layers, num_heads=HEADS, head_dim=32, norm_length=1
    )
    layers = [layer for weights in stack._weights() for layer in weights]
    return [p.detach().to(**form).requires_grad_() for p in layers]


def inputs_of(lengths: list[int], seed: int = 0, **form: object) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    rows = torch.randn(total, WIDTH, generator=generator).to(**form)
    exact = torch.promote_types(rows.dtype, torch.float32)
    weights = torch.rand(total, generator=generator, dtype=exact).to(rows.device)
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], device=rows.device)
    return Inputs(rows.requires_grad_(), weights, offsets, max(lengths), NORM_LENGTH)


def plainly(inputs: Inputs, parameters: list[Tensor], form: LayerForm = FORM) -> Tensor:
    """The same, launch by launch."""
    count, dtype = len(LayerWeights._fields), inputs.rows.dtype
    layers = [
        LayerWeights(*(p.to(dtype) for p in parameters[i : i + count]))
        for i in range(0, len(parameters), count)
    ]
    spec = AttentionSpec(
        offsets=inputs.offsets,
        column_weights=inputs.column_weights,
        max_length=inputs.max_length,
        alpha=ALPHA,
        norm_length=inputs.norm_length,
        exact=True,
    )
    return read_sequences(
        inputs.rows,
        layers,
        spec,
        form,
        candidate_offsets=torch.arange(len(inputs.offsets), device=inputs.offsets.device),
        candidate_rows=inputs.offsets[1:] - 1,
        max_candidates=1,
    )


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-9))


@pytest.mark.parametrize("count", [1, 15, 16, 17, 100, 128, 129, 1000, 65536])
def test_padded_sizes_are_few_and_close(count: int) -> None:
    size = padded_size(count)
    assert count <= size <= max(16, count * 1.15 + 16)
    assert padded_size(size) == size
    assert len({padded_size(n) for n in range(1024, 2049)}) <= 9


def test_a_padded_pass_is_the_pass_and_forgets_the_last_one() -> None:
    parameters = new_parameters(dtype=torch.float64)
    first = inputs_of([20, 1, 9, 30], dtype=torch.float64)
    padded = PaddedPass(first.sizes(), weight_buffers(parameters, torch.float64), FORM, ALPHA)
    for inputs in (first, inputs_of([3, 2, 31], seed=1, dtype=torch.float64)):
        count, used = len(inputs.offsets) - 1, len(inputs.rows)
        padded.load(inputs, parameters, None)
        ours, wanted = padded.candidates(), plainly(inputs, parameters)
        torch.testing.assert_close(ours[:count], wanted, rtol=1e-6, atol=1e-9)
        grad = torch.zeros_like(ours)
        grad[:count] = torch.randn_like(wanted)
        got = torch.autograd.grad(ours, [padded.rows, *padded.weights], grad)
        reference = torch.autograd.grad(wanted, [inputs.rows, *parameters], grad[:count])
        assert not got[0][used:].any()
        for a, b in zip((got[0][:used], *got[1:]), reference, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def on_gpu() -> tuple[list[Tensor], dict[str, object]]:
    return new_parameters(device="cuda"), {"device": "cuda", "dtype": torch.bfloat16}


class TestGraphs:
    pytestmark = GPU

    def test_replayed_steps_are_the_steps(self) -> None:
        parameters, form = on_gpu()
        captured = CapturedStack()
        for seed, lengths in enumerate(([30, 40, 26], [29, 41, 26], [1, 5], [30, 40, 26], [500])):
            inputs = inputs_of(lengths, seed, **form)
            ours, wanted = (
                captured.run(inputs, parameters, FORM, ALPHA),
                plainly(inputs, parameters),
            )
            assert ours is not None
            assert relative_error(ours, wanted) < 1e-2
            leaves = [inputs.rows, *parameters]
            got = torch.autograd.grad(ours.float().square().sum(), leaves)
            reference = torch.autograd.grad(wanted.float().square().sum(), leaves)
            for a, b in zip(got, reference, strict=True):
                assert a.dtype == b.dtype
                assert relative_error(a, b) < 3e-2
            with torch.no_grad():  # as an optimizer would
                for p in parameters:
                    p.add_(0.01 * torch.randn_like(p))
        assert len(captured._graphs) == 3

    def test_gradients_add_up_over_steps(self) -> None:
        parameters, form = on_gpu()
        captured = CapturedStack()
        sums = [torch.zeros_like(p) for p in parameters]
        for seed in range(3):
            inputs = inputs_of([12, 20], seed, **form)
            captured.run(inputs, parameters, FORM, ALPHA).float().square().sum().backward()
            plain = plainly(inputs, parameters).float().square().sum()
            for total, grad in zip(sums, torch.autograd.grad(plain, parameters), strict=True):
                total += grad
        for p, total in zip(parameters, sums, strict=True):
            assert relative_error(p.grad, total) < 3e-2

    def test_a_pass_whose_backward_is_to_come_is_left_alone(self) -> None:
        parameters, form = on_gpu()
        captured = CapturedStack()
        inputs = inputs_of([12, 20], **form)
        output = captured.run(inputs, parameters, FORM, ALPHA)
        assert captured.run(inputs, parameters, FORM, ALPHA) is None
        output.sum().backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="one backward only"):
            output.sum().backward()
        dropped = captured.run(inputs, parameters, FORM, ALPHA)
        assert dropped is not None
        del dropped
        assert captured.run(inputs, parameters, FORM, ALPHA) is not None

    def test_dropout_follows_the_seed(self) -> None:
        parameters, form = on_gpu()
        captured, inputs = CapturedStack(), inputs_of([12, 20], **form)

        def run(seed: int) -> Tensor:
            dropout = Dropout(0.3, torch.tensor([seed], device="cuda"))
            output = captured.run(inputs, parameters, FORM._replace(dropout=dropout), ALPHA)
            plain = plainly(inputs, parameters, FORM._replace(dropout=dropout))
            assert relative_error(output, plain) < 1e-2
            return output.detach()

        assert torch.equal(run(1), run(1))
        assert not torch.equal(run(1), run(2))

    def test_without_gradients_nothing_is_captured_and_a_copy_has_no_graphs(self) -> None:
        parameters, form = on_gpu()
        captured, inputs = CapturedStack(), inputs_of([12, 20], **form)
        with torch.no_grad():
            assert captured.run(inputs, parameters, FORM, ALPHA) is None
        captured.run(inputs, parameters, FORM, ALPHA)
        assert captured._graphs
        assert not copy.deepcopy(captured)._graphs
