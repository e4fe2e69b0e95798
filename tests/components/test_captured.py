"""Padded copies of inputs, and a function as CUDA graphs against the function itself."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hpgr_plugin.components import captured as captured_module
from hpgr_plugin.components.captured import (
    CapturedFunction,
    PaddedInput,
    _Flight,
    _Replay,
    forms,
    load,
    memory_of,
    padded_size,
)

WIDTH = 32
GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("count", [1, 15, 16, 17, 100, 128, 129, 1000, 65536])
def test_padded_sizes_are_few_and_close(count: int) -> None:
    size = padded_size(count)
    assert count <= size <= max(16, count * 1.15 + 16)
    assert padded_size(size) == size
    assert len({padded_size(n) for n in range(1024, 2049)}) <= 9


@pytest.mark.parametrize("count", [65536, 65537, 131073, 467_000])
def test_large_sizes_are_closer(count: int) -> None:
    assert count <= padded_size(count) <= count * (1 + 1 / 32)
    assert len({padded_size(n) for n in range(1 << 16, (1 << 17) + 1, 64)}) <= 33


def test_there_is_no_size_of_zero() -> None:
    assert padded_size(0) == 16


def test_what_the_last_inputs_left_is_filled() -> None:
    targets = {name: torch.full((6, 2), 9.0) for name in "ab"}
    given = {
        "a": PaddedInput(torch.ones(2, 2), 6),
        "b": PaddedInput(torch.ones(4, 2), 6, filler=5),
    }
    load(given, targets)
    assert torch.equal(targets["a"][:, 0], torch.tensor([1.0, 1, 0, 0, 0, 0]))
    assert torch.equal(targets["b"][:, 0], torch.tensor([1.0, 1, 1, 1, 5, 5]))


def test_filler_may_go_on_in_steps() -> None:
    target = {"offsets": torch.full((6,), 9)}
    given = PaddedInput(torch.tensor([0, 2, 5]), 6, filler=9, step=4)
    load({"offsets": given}, target)
    assert target["offsets"].tolist() == [0, 2, 5, 9, 13, 17]
    assert given.empty().tolist() == [0, 0, 0, 9, 13, 17]
    load({"offsets": PaddedInput(torch.arange(6), 6, filler=9, step=4)}, target)
    assert target["offsets"].tolist() == list(range(6))


def cpu_graph(weight: Tensor, rows: Tensor) -> Any:
    """What a graph of `rows * weight` holds, with its launches done by the CPU."""
    graph = SimpleNamespace(
        inputs={"rows": torch.zeros_like(rows)},
        learned=["rows"],
        output=torch.zeros_like(rows),
        grad=torch.zeros_like(rows),
        grads=(torch.zeros_like(rows), torch.zeros_like(weight)),
    )

    def forward() -> None:
        graph.output.copy_(graph.inputs["rows"] * weight)

    def backward() -> None:
        graph.grads[0].copy_(graph.grad * weight)
        graph.grads[1].copy_((graph.grad * graph.inputs["rows"]).sum(0))

    graph.forward, graph.backward = (
        SimpleNamespace(replay=forward),
        SimpleNamespace(replay=backward),
    )
    return graph


class TestReplay:
    @staticmethod
    def tensors() -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        return torch.randn(4, requires_grad=True), torch.randn(6, 4, requires_grad=True)

    @staticmethod
    def replay(weight: Tensor, rows: Tensor) -> Tensor:
        inputs = {"rows": PaddedInput(rows, len(rows))}
        flight = _Flight(cpu_graph(weight.detach(), rows.detach()))
        output: Tensor = _Replay.apply(flight, inputs, "the binding", None, rows, weight)
        return output

    def test_gradients_reach_inputs_and_parameters(self) -> None:
        weight, rows = self.tensors()
        got = torch.autograd.grad(self.replay(weight, rows).square().sum(), [rows, weight])
        wanted = torch.autograd.grad((rows * weight).square().sum(), [rows, weight])
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b)

    def test_rows_beyond_those_that_are_read_get_no_gradient(self) -> None:
        weight, rows = self.tensors()
        graph = cpu_graph(weight.detach(), rows.detach())
        graph.grad.fill_(9)  # of an earlier pass
        inputs = {"rows": PaddedInput(rows, len(rows))}
        output = _Replay.apply(_Flight(graph), inputs, "the binding", 4, rows, weight)
        got = torch.autograd.grad(output.square().sum(), [rows, weight])
        wanted = torch.autograd.grad((rows * weight)[:4].square().sum(), [rows, weight])
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b)

    def test_a_parameter_changed_before_the_backward_is_an_error(self) -> None:
        weight, rows = self.tensors()
        output = self.replay(weight, rows)
        with torch.no_grad():
            weight.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()

    def test_second_derivatives_are_refused(self) -> None:
        weight, rows = self.tensors()
        output = self.replay(weight, rows)
        with pytest.raises(RuntimeError, match="the binding = False for create_graph=True"):
            torch.autograd.grad(output.square().sum(), rows, create_graph=True)

    def test_a_second_backward_is_refused(self) -> None:
        output = self.replay(*self.tensors())
        output.sum().backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="one backward only: with the binding = False"):
            output.sum().backward()


def test_the_key_of_a_graph_knows_widths_and_what_needs_a_gradient() -> None:
    rows, weight = torch.zeros(3, 4), torch.zeros(4, requires_grad=True)
    inputs = {"rows": PaddedInput(rows, 16)}
    key = forms(inputs, {"weight": weight})
    assert forms({"rows": PaddedInput(rows[:2], 16)}, {"weight": weight}) == key
    assert forms({"rows": PaddedInput(rows[:, :2], 16)}, {"weight": weight}) != key
    assert forms({"rows": PaddedInput(rows.double(), 16)}, {"weight": weight}) != key
    assert forms({"rows": PaddedInput(rows.requires_grad_(), 16)}, {"weight": weight}) != key
    assert forms(inputs, {"weight": weight.detach()}) != key


def test_memory_of_frozen_parameters_and_buffers_counts() -> None:
    tensors = {"frozen": torch.zeros(4), "buffer": torch.zeros(2)}
    before = memory_of(tensors)
    tensors["buffer"].add_(1)  # in place
    assert memory_of(tensors) == before
    for name in tensors:
        assert memory_of({**tensors, name: torch.zeros_like(tensors[name])}) != before


@pytest.mark.parametrize("kind", ["nothing to learn", "not a leaf", "no_grad"])
def test_what_has_no_gradient_of_its_own_is_not_captured(kind: str) -> None:
    weight = torch.zeros(4, requires_grad=kind != "nothing to learn")
    if kind == "not a leaf":
        weight = weight * 2
    with torch.set_grad_enabled(kind != "no_grad"):
        captured = CapturedFunction("binding")
        inputs = {"rows": PaddedInput(torch.zeros(3, 4), 16)}
        assert captured.run(lambda *_: torch.zeros(0), inputs, {"weight": weight}, "key") is None


def test_the_first_graph_and_one_after_all_are_gone_take_a_new_pool(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """CUDA's allocator refuses a pool whose last graph is gone while an output of it is kept."""
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    pools: list[Any] = []
    monkeypatch.setattr(captured_module, "_Graph", lambda *given: pools.append(given[-1]))
    captured = CapturedFunction("binding")
    for key in ("first", "second"):
        captured._graphs[key] = captured._capture(lambda *_: torch.zeros(0), {}, {})
    captured._graphs.clear()
    captured._capture(lambda *_: torch.zeros(0), {}, {})
    first, second, after = pools
    assert first is second
    assert after is not first


def test_sizes_can_wait_until_they_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    captured = CapturedFunction("binding")
    weight, rows = torch.ones(4, requires_grad=True), torch.ones(6, 4)
    inputs = {"rows": PaddedInput(rows, len(rows))}

    def replays(key: str, **settings: Any) -> bool:
        graph = cpu_graph(weight.detach(), rows)
        graph.learned, graph.trained = [], ["weight"]
        monkeypatch.setattr(captured, "_capture", lambda *_: graph)
        run = captured.run(lambda *_: rows, inputs, {"weight": weight}, key, **settings)
        return run is not None

    assert [replays(key, at_first=False) for key in "abab"] == [False, False, True, True]
    assert replays("c")
    assert not replays("d", most_graphs=3)
    assert replays("a", most_graphs=3)


class TestGraphs:
    pytestmark = GPU

    @staticmethod
    def model() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, 3)).cuda()

    @staticmethod
    def rows(count: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(count, WIDTH, generator=generator).cuda().requires_grad_()

    @staticmethod
    def run(captured: CapturedFunction, model: nn.Module, rows: Tensor) -> Tensor | None:
        inputs = {
            "rows": PaddedInput(rows, padded_size(len(rows))),
            "scale": PaddedInput(torch.full((1,), 2.0, device="cuda"), 1),
        }
        output = captured.run(
            lambda copies, own: (
                torch.func.functional_call(model, own, copies["rows"]) * copies["scale"]
            ),
            inputs,
            dict(model.named_parameters()),
            "key",
        )
        return None if output is None else output[: len(rows)]

    def test_replayed_passes_are_the_passes(self) -> None:
        model, captured = self.model(), CapturedFunction("binding")
        for seed, count in enumerate((90, 96, 5, 90, 500)):
            rows = self.rows(count, seed)
            ours, wanted = self.run(captured, model, rows), model(rows) * 2
            assert ours is not None
            torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)
            leaves = [rows, *model.parameters()]
            got = torch.autograd.grad(ours.square().sum(), leaves)
            reference = torch.autograd.grad(wanted.square().sum(), leaves)
            for a, b in zip(got, reference, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
            with torch.no_grad():  # as an optimizer would
                for p in model.parameters():
                    p.add_(0.01 * torch.randn_like(p))
        assert len(captured._graphs) == 3

    def test_gradients_add_up_over_passes(self) -> None:
        model, captured = self.model(), CapturedFunction("binding")
        sums = [torch.zeros_like(p) for p in model.parameters()]
        for seed in range(3):
            rows = self.rows(20, seed)
            self.run(captured, model, rows).square().sum().backward()
            plain = (model(rows) * 2).square().sum()
            for total, grad in zip(
                sums, torch.autograd.grad(plain, list(model.parameters())), strict=True
            ):
                total += grad
        for p, total in zip(model.parameters(), sums, strict=True):
            torch.testing.assert_close(p.grad, total, rtol=1e-3, atol=1e-3)

    def test_a_pass_whose_backward_is_to_come_is_left_alone(self) -> None:
        model, captured, rows = self.model(), CapturedFunction("the binding"), self.rows(20)
        output = self.run(captured, model, rows)
        assert self.run(captured, model, rows) is None
        output.sum().backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="one backward only: with the binding = False"):
            output.sum().backward()
        dropped = self.run(captured, model, rows)
        assert dropped is not None
        del dropped
        assert self.run(captured, model, rows) is not None

    def test_parameters_that_moved_are_found(self) -> None:
        model, captured, rows = self.model(), CapturedFunction("binding"), self.rows(20)
        self.run(captured, model, rows).sum().backward()
        held = [graph.output for graph in captured._graphs.values()]
        with torch.no_grad():
            for p in model.parameters():
                p.data = torch.randn_like(p)
        torch.testing.assert_close(
            self.run(captured, model, rows), model(rows) * 2, rtol=1e-4, atol=1e-5
        )
        assert held  # memory of the pool that the graphs before had

    def test_what_waits_for_the_device_is_refused_by_its_binding(self) -> None:
        captured, rows = CapturedFunction("hpgr.A.capture"), self.rows(20)
        with pytest.raises(RuntimeError, match=r"bind hpgr\.A\.capture = False"):
            captured.run(
                lambda copies, _: copies["rows"] * float(copies["rows"].sum().item()),
                {"rows": PaddedInput(rows, 32)},
                {},
                "key",
            )

    def test_without_gradients_nothing_is_captured_and_a_copy_has_no_graphs(self) -> None:
        model, captured, rows = self.model(), CapturedFunction("binding"), self.rows(20)
        with torch.no_grad():
            assert self.run(captured, model, rows) is None
        self.run(captured, model, rows)
        assert captured._graphs
        assert not copy.deepcopy(captured)._graphs
