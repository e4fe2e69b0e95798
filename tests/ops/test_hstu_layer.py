"""Stacks of HSTU layers on every backend against the same formulas on the loops of naive.py."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from triton_device import DEVICE, offsets_of

from hpgr_plugin.components.hstu_stack import HSTUStack, read_histories
from hpgr_plugin.ops.compact import KeptRows, compact
from hpgr_plugin.ops.hstu_attention import AttentionSpec
from hpgr_plugin.ops.hstu_layer import Dropout, LayerForm, candidate_layer, hstu_layer
from hpgr_plugin.ops.hstu_layer.naive import hstu_layer as naive_layer
from hpgr_plugin.ops.preference_plan import PlanInputs, PlanSettings
from hpgr_plugin.ops.preference_plan.triton import select, weight_matrix

WIDTH, HEADS, HEAD_DIM = 24, 2, 16
FORM = LayerForm(HEADS)
UseBackends = Callable[..., None]


def new_stack(num_layers: int = 2, norm_length: int = 3) -> HSTUStack:
    stack = HSTUStack(
        embedding_dim=WIDTH,
        num_layers=num_layers,
        num_heads=HEADS,
        head_dim=HEAD_DIM,
        norm_length=norm_length,
    )
    for parameter in stack.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return stack.to(DEVICE)


def assert_same_step(ours: Tensor, reference: Tensor, inputs: list[Tensor]) -> None:
    grad = torch.randn_like(ours)
    torch.testing.assert_close(ours, reference, rtol=2e-4, atol=2e-4)
    pairs = zip(
        torch.autograd.grad(ours, inputs, grad),
        torch.autograd.grad(reference, inputs, grad),
        strict=True,
    )
    for got, wanted in pairs:
        scale = float(wanted.abs().max()) or 1.0
        torch.testing.assert_close(got / scale, wanted / scale, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("spare_rows", [0, 5])
def test_a_stack_equals_its_layers_in_loops(
    spare_rows: int, backend: str, use_backends: UseBackends
) -> None:
    use_backends(hstu_layer=backend)
    torch.manual_seed(0)
    stack, offsets = new_stack(), offsets_of([1, 9, 20])
    total = int(offsets[-1])
    x = torch.randn(total + spare_rows, WIDTH, device=DEVICE)
    x[total:] = 0.0
    x.requires_grad_()
    weights = torch.rand(total + spare_rows, device=DEVICE)

    ours = stack(x, weights, offsets, max_length=20, exact=spare_rows == 0)

    spec = stack._spec(offsets, weights, 20, True)
    reference = x
    for layer in stack._weights():
        reference = naive_layer(reference, layer, spec, FORM, None)
    assert_same_step(ours, reference[offsets[1:] - 1], [x, *stack.parameters()])


def dense_case() -> tuple[HSTUStack, Tensor, list[Tensor], AttentionSpec]:
    torch.manual_seed(0)
    stack, offsets = new_stack(num_layers=1), offsets_of([3, 0, 17])
    x = torch.randn(20, WIDTH, device=DEVICE, requires_grad=True)
    spec = stack._spec(offsets, torch.rand(20, device=DEVICE), 17, True)
    return stack, x, [x, *stack.parameters()], spec


def test_what_is_computed_again_is_the_same_to_the_last_bit(poisoned_memory: None) -> None:
    stack, x, inputs, spec = dense_case()
    (layer,) = stack._weights()
    grad = torch.randn(20, WIDTH, device=DEVICE)
    results = []
    for recompute in (False, True):
        form = LayerForm(HEADS, recompute=recompute)
        out = hstu_layer(x, layer, spec, form, backend="triton")
        results.append([out, *torch.autograd.grad(out, inputs, grad)])
    for kept, again in zip(*results, strict=True):
        assert torch.equal(kept, again)


@pytest.mark.parametrize("recompute", [False, True])
def test_dropout_takes_its_share_and_the_backward_the_same_numbers(recompute: bool) -> None:
    """An output weight of columns of the identity shows the gated numbers themselves."""
    stack, x, _, spec = dense_case()
    hidden = HEADS * HEAD_DIM
    (layer,) = stack._weights()
    form = LayerForm(HEADS, recompute=recompute)
    rate, seed = 0.3, torch.tensor([7], device=DEVICE)

    def gated(stream: int, part: int) -> Tensor:
        weight = torch.eye(3 * hidden, device=DEVICE)[:, part * WIDTH : (part + 1) * WIDTH]
        chosen = layer._replace(output_weight=weight)
        dropped = form._replace(dropout=Dropout(rate, seed, stream))
        return hstu_layer(x, chosen, spec, dropped, backend="triton") - x

    shares = []
    for part in range(4):
        weight = torch.eye(3 * hidden, device=DEVICE)[:, part * WIDTH : (part + 1) * WIDTH]
        whole = hstu_layer(x, layer._replace(output_weight=weight), spec, form) - x
        ours = gated(2, part)
        mask = (ours.detach() != 0).float() / (1 - rate)
        shares.append(float((ours == 0).float().mean()))
        torch.testing.assert_close(ours, whole * mask, rtol=1e-4, atol=1e-5)
        grad = torch.randn_like(ours)
        (got,) = torch.autograd.grad(ours, x, grad)
        (wanted,) = torch.autograd.grad(whole * mask, x, grad)
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-5)
        assert torch.equal(gated(2, part), ours)
        assert not torch.equal(gated(3, part), ours)
    assert abs(sum(shares) / len(shares) - rate) < 0.03


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_norms_may_be_of_higher_precision(backend: str) -> None:
    stack, x, _, spec = dense_case()
    (layer,) = stack._weights()
    dtype = torch.float16  # Triton's interpreter knows no bfloat16
    low = layer._replace(
        **{name: getattr(layer, name).to(dtype) for name in layer._fields if "norm" not in name}
    )
    out = hstu_layer(x.to(dtype), low, spec, FORM, backend=backend)
    assert out.dtype == dtype
    grads = torch.autograd.grad(out.float().square().sum(), [x, *stack.parameters()])
    assert [g.dtype for g in grads] == [torch.float32] * len(grads)
    reference = hstu_layer(x, layer, spec, FORM, backend="torch")
    error = (out.float() - reference).norm() / reference.norm()
    assert error < 2e-2


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_shared_history_equals_one_long_masked_sequence(
    backend: str, weighted: bool, use_backends: UseBackends
) -> None:
    """Also where every column of the history has a weight of its own, for all of its readers."""
    use_backends(hstu_layer=backend)
    torch.manual_seed(0)
    stack = new_stack(num_layers=2)
    history_lengths, candidate_counts = [0, 5, 30], [1, 3, 2]
    history_offsets, candidate_offsets = offsets_of(history_lengths), offsets_of(candidate_counts)
    history = torch.randn(35, WIDTH, device=DEVICE, requires_grad=True)
    candidates = torch.randn(6, WIDTH, device=DEVICE, requires_grad=True)
    matrix = torch.rand(6, 30, device=DEVICE)

    if weighted:
        column_weights = torch.rand(35, device=DEVICE)
        own = stack._spec(history_offsets, column_weights, 30, True)
        read = own.replace(
            query_offsets=candidate_offsets, row_weights=matrix, max_query_length=3, causal=False
        )
        ours = read_histories(history, candidates, stack._weights(), (own, read), FORM)
    else:
        column_weights = torch.ones(35, device=DEVICE)
        ours = stack.shared_history(
            history, candidates, history_offsets, candidate_offsets, matrix, max_candidates=3
        )

    order, offsets, masks = [], [0], []
    for b, (length, count) in enumerate(zip(history_lengths, candidate_counts, strict=True)):
        start, first = int(history_offsets[b]), int(candidate_offsets[b])
        order += list(range(start, start + length)) + list(range(35 + first, 35 + first + count))
        offsets.append(len(order))
        mask = torch.ones(length + count, 33, device=DEVICE)
        mask[length:, :length] = matrix[first : first + count, :length]
        masks.append(mask)
    spec = stack._spec(torch.tensor(offsets, device=DEVICE), None, 33, True)
    rows = torch.cat([history, candidates])[order]
    targets = torch.tensor(candidate_counts, device=DEVICE)
    columns = torch.cat([column_weights, torch.ones(6, device=DEVICE)])[order]
    spec = spec.replace(row_weights=torch.cat(masks), num_targets=targets, column_weights=columns)
    for layer in stack._weights():
        rows = naive_layer(rows, layer, spec, FORM, None)
    reference = rows[[place for place, row in enumerate(order) if row >= 35]]
    assert_same_step(ours, reference, [history, candidates, *stack.parameters()])


@pytest.mark.parametrize("backend", ["triton", "torch", "naive"])
def test_the_last_candidate_layer_returns_the_history(backend: str) -> None:
    stack = new_stack(num_layers=1)
    history, candidates = (torch.randn(n, WIDTH, device=DEVICE) for n in (4, 1))
    spec = stack._spec(offsets_of([4]), None, 4, True)
    reading = spec.replace(query_offsets=offsets_of([1]), max_query_length=1, causal=False)
    (layer,) = stack._weights()
    kept, _ = candidate_layer(
        (history, candidates), layer, (spec, reading), FORM, last=True, backend=backend
    )
    assert kept is history


@pytest.mark.parametrize("disjoint", [True, False])
def test_gathered_rows_follow_the_selection_and_carry_gradients(disjoint: bool) -> None:
    torch.manual_seed(0)
    history_offsets = offsets_of([0, 4, 40])
    candidate_offsets = offsets_of([1, 1, 1] if disjoint else [0, 3, 4])
    count = int(candidate_offsets[-1])
    history = torch.randn(44, WIDTH, device=DEVICE, requires_grad=True)
    candidates = torch.randn(count, WIDTH, device=DEVICE, requires_grad=True)
    inputs = PlanInputs(
        history.detach(), candidates.detach(), history_offsets, candidate_offsets,
        max_history=40, max_candidates=1 if disjoint else 4,
    )  # fmt: skip
    settings = PlanSettings(top_k=2, sigma=1.0, recent=3)
    selection = select(inputs, settings, with_candidates=True)
    used, room = int(selection.offsets[-1]), len(selection.index)
    assert used <= room

    kept = KeptRows(selection.index, selection.offsets, room, disjoint)
    rows = compact(history, candidates, kept, backend="triton")

    reference = torch.cat([history, candidates])[selection.index[:used]]
    torch.testing.assert_close(rows[:used], reference, rtol=0, atol=0)
    assert not rows[used:].any()
    assert_same_step(rows[:used], reference, [history, candidates])

    matrix = weight_matrix(inputs, settings)
    for c in range(count):
        first, last = int(selection.offsets[c]), int(selection.offsets[c + 1]) - 1
        user = int((candidate_offsets[1:] <= c).sum())
        places = selection.index[first:last] - history_offsets[user]
        torch.testing.assert_close(matrix[c, places], selection.weights[first:last])
        assert int((matrix[c] > 0).sum()) == last - first
