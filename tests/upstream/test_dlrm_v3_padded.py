"""The transducer's pass over padded copies of its inputs, against the pass itself; no graphs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_ranker import TABLE_DIM, WIDTH, assert_same_step, batch, build, small_config, step
from torch import Tensor

from hpgr_plugin.components.attention_hooks import PreferenceGuidedSparseAttention
from hpgr_plugin.components.captured import CapturedFunction, forms, load, memory_of
from hpgr_plugin.components.positions import TimeAwarePositionalEncoder
from hpgr_plugin.components.sem import SessionEnhancementModule
from hpgr_plugin.errors import HpgrError
from hpgr_plugin.hosts.dlrm_v3 import DlrmHSTU, captured_passes
from hpgr_plugin.hosts.dlrm_v3.captured_passes import CapturedPasses
from hpgr_plugin.hosts.dlrm_v3.request import Request
from hpgr_plugin.log_once import log_once
from hpgr_plugin.ops.compact.parts import joined_parts

pytestmark = [pytest.mark.upstream, pytest.mark.usefixtures("float64_operators")]

SHAPES = {
    "one-each": ([7, 3, 11, 0, 40], [1] * 5),
    "several": ([7, 3, 11], [2, 1, 3]),
    "many": ([60, 1, 30], [8, 8, 1]),
    "empty-history": ([0, 5, 0], [1, 2, 3]),
    "no-candidates": ([4, 6], [0, 2]),
    "one-user": ([5], [1]),
}


class Eager(CapturedFunction):
    """Runs the function on padded copies, which it keeps dirty between passes."""

    def run(
        self,
        function: Any,
        inputs: Any,
        parameters: Any,
        key: Any,
        *,
        rows: int | None = None,
        **_: Any,
    ) -> Tensor | None:
        copies = {}
        for name, given in inputs.items():
            buffer = given.empty().detach()
            dirty = {name: torch.full_like(buffer, 3)}
            load({name: given}, dirty)
            # Filler of the buffer is what `load` leaves too.
            assert torch.equal(dirty[name][len(given.values) :], buffer[len(given.values) :])
            rest = buffer[len(given.values) :]
            copies[name] = torch.cat([given.values, rest])  # keeps the gradient
            assert len(copies[name]) == given.size
        self.passes = getattr(self, "passes", 0) + 1
        self.keys = [*getattr(self, "keys", []), (key, forms(inputs, parameters))]
        self.memory = memory_of(parameters)
        return function(copies, dict(parameters))[:rows]


def slots(kind: str, layout: Any = "per_candidate") -> dict[str, Any]:
    torch.manual_seed(3)
    hook = PreferenceGuidedSparseAttention(top_k=3, sigma=1.0, recent=2, layout=layout)
    given: dict[str, Any] = {"attention_hook": hook}
    if kind != "hook":
        given["positional_encoder"] = TimeAwarePositionalEncoder(
            embedding_dim=WIDTH, max_positions=128
        )
    if kind in ("all", "own session"):
        given["sem"] = SessionEnhancementModule(
            embedding_dim=TABLE_DIM,
            gap_seconds=900,
            num_heads=2,
            gate_init=0.5,
            own_session=kind == "own session",
        )
    return given


def model(kind: str, *, padded: bool, layout: Any = "per_candidate", **config: Any) -> Any:
    built = build(
        DlrmHSTU,
        dtype=torch.float64,
        layers="fused",
        max_blind_share=1.0,
        config=small_config(**config),
        **slots(kind, layout),
    )
    if padded:
        passes = CapturedPasses(built.features, binding="hpgr.DlrmHSTU.capture")
        passes._function = Eager("hpgr.DlrmHSTU.capture")
        built._hstu_transducer.captured = passes
        built._hstu_transducer._can_capture = lambda rows: True
    return built


@pytest.mark.parametrize("later", [True, False], ids=["later", "inside"])
@pytest.mark.parametrize("kind", ["hook", "positions", "all", "own session"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("layout", ["per_candidate", "shared_history"])
def test_a_padded_pass_is_the_pass(layout: str, shape: Any, kind: str, later: bool) -> None:
    data = batch(*shape, later=later)
    built = model(kind, padded=True, layout=layout)
    reference = step(model(kind, padded=False, layout=layout), data)
    mine = step(built, data)
    assert built._hstu_transducer.captured._function.passes == 1
    assert_same_step(mine, reference)


@pytest.mark.parametrize(
    "shape", [([0, 0], [1, 2]), ([3, 4], [0, 0])], ids=["history", "candidates"]
)
@pytest.mark.parametrize("layout", ["per_candidate", "shared_history"])
def test_batches_without_histories_or_candidates(layout: str, shape: Any) -> None:
    data = batch(*shape)
    reference = step(model("all", padded=False, layout=layout), data)
    assert_same_step(step(model("all", padded=True, layout=layout), data), reference)


class Narrow(PreferenceGuidedSparseAttention):
    """Names its rows in 32 bits."""

    def plan(self, inputs: Any) -> Any:
        plan = super().plan(inputs)
        return None if plan is None else plan._replace(index=plan.index.int())


def test_plans_in_32_bits_are_padded_too() -> None:
    data = batch([7, 3, 11], [1, 1, 1])
    hook = {"top_k": 3, "sigma": 1.0, "recent": 2, "layout": "per_candidate"}
    steps = []
    for hook_class in (Narrow, PreferenceGuidedSparseAttention):
        built = model("all", padded=True)
        built._fill_attention_hook(hook_class(**hook))
        steps.append(step(built, data))
    assert_same_step(*steps)


def test_similar_batches_share_their_sizes() -> None:
    seen = set()
    built = model("positions", padded=True)
    run = built._hstu_transducer.captured._function.run

    def note(function: Any, inputs: Any, parameters: Any, key: Any, **others: Any) -> Any:
        seen.add((key, tuple((name, given.size) for name, given in inputs.items())))
        return run(function, inputs, parameters, key, **others)

    built._hstu_transducer.captured._function.run = note
    for seed in range(10):
        step(built, batch([60 + seed, 1, 30, 9], [1, 1, 1, 1], seed=seed))
    assert 1 <= len(seen) <= 3


@pytest.mark.parametrize("mode", ["evaluation", "pre", "no plan"])
def test_other_passes_are_not_padded(mode: str) -> None:
    built = model("hook", padded=True)
    hook = built.attention_hook
    if mode == "evaluation":
        built.eval()
    elif mode == "pre":
        hook.mask_position = "pre"
    else:
        built._plan = lambda _: None
    built(*batch([7, 3], [1, 1]))
    assert not hasattr(built._hstu_transducer.captured._function, "passes")


@pytest.mark.parametrize(("counts", "captured"), [([1, 1], True), ([8, 8], False)])
def test_many_gathered_rows_are_not_captured(
    monkeypatch: pytest.MonkeyPatch, counts: list[int], captured: bool
) -> None:
    """Users with 30 items and 2 contextual tokens; every candidate reads a part of them."""
    monkeypatch.setattr(captured_passes, "_MOST_ROWS", 90)
    built = model("hook", padded=True)
    built(*batch([30, 30], counts))
    assert hasattr(built._hstu_transducer.captured._function, "passes") == captured


class Louder(TimeAwarePositionalEncoder):
    """An encoder of a user's own package."""


def silent(*_: Any) -> None:
    """A hook."""


CHANGES: dict[str, Callable[[Any], Any]] = {
    "hook on SEM": lambda t: t._input_preprocessor.sem.register_forward_pre_hook(silent),
    "hook on the encoder": lambda t: t._positional_encoder.register_full_backward_hook(silent),
    "hook on the output": lambda t: t._output_postprocessor.register_forward_hook(silent),
    "own encoder": lambda t: setattr(
        t._positional_encoder, "encoder", Louder(embedding_dim=WIDTH, max_positions=128)
    ),
    "own forward": lambda t: setattr(
        t._output_postprocessor, "forward", t._output_postprocessor.forward
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_replays_would_leave_out_is_not_captured(
    change: str, caplog: pytest.LogCaptureFixture
) -> None:
    built = model("all", padded=True)
    function = built._hstu_transducer.captured._function
    step(built, batch([7, 3], [1, 1]))
    assert function.passes == 1
    CHANGES[change](built._hstu_transducer)
    log_once.cache_clear()
    with caplog.at_level("INFO"):
        step(built.double(), batch([7, 3], [1, 1]))
    assert function.passes == 1
    assert "hpgr.DlrmHSTU.capture = True has no effect: '" in caplog.text
    assert "of PreferenceTransducer" in caplog.text


def test_what_a_pass_depends_on_is_in_its_key() -> None:
    built = model("all", padded=True)
    transducer, data = built._hstu_transducer, batch([7, 3], [1, 1])
    function = transducer.captured._function

    def keys_of(*changes: Callable[[], Any]) -> list[Any]:
        for change in changes:
            change()
            step(built, data)
        return function.keys[-len(changes) :]

    def nothing() -> None:
        pass

    def drop(rate: float) -> None:
        transducer._input_dropout_ratio = rate

    def drop_in_layers(rate: float) -> None:
        for layer in layers:
            layer._output_dropout_ratio = rate

    layers = transducer._stu_module._stu_layers
    bias = layers[0]._uvqk_beta
    same = keys_of(nothing, nothing)
    assert same[0] == same[1]
    changed = keys_of(
        lambda: drop(0.25),
        lambda: drop_in_layers(0.5),
        lambda: transducer._input_preprocessor.eval(),
        lambda: bias.requires_grad_(False),
    )
    assert len({same[0], *changed}) == 5
    bias.requires_grad_(True)
    drop(0.0)
    drop_in_layers(0.0)
    transducer.train()
    assert keys_of(nothing) == [same[0]]


def test_frozen_parameters_that_moved_are_noticed() -> None:
    built = model("all", padded=True)
    transducer, data = built._hstu_transducer, batch([7, 3], [1, 1])
    frozen = transducer._input_preprocessor.sem.session_position.requires_grad_(False)
    seen = []
    for _ in range(2):
        step(built, data)
        seen.append(transducer.captured._function.memory)
    assert seen[0] == seen[1]
    frozen.data = frozen.data.clone()
    step(built, data)
    assert transducer.captured._function.memory != seen[0]


def test_a_request_inside_another_restores_it() -> None:
    built = model("all", padded=False)
    transducer = built._hstu_transducer
    first, second = (
        Request(joined_parts(o, o, contextual_len=2, num_history=n, num_candidates=n), None, n)
        for o, n in ((torch.tensor([0, 1]), 1), (torch.tensor([0, 2]), 2))
    )
    with transducer.requested(first):
        with transducer.requested(second):
            assert transducer._request is second
        assert transducer._request is first
    assert transducer._request is None


@pytest.mark.parametrize("place", ["stack", "first layer", "last layer"])
@pytest.mark.parametrize("layers", ["fused", "host"])
def test_hooks_on_layers_run_or_are_refused(layers: str, place: str) -> None:
    built = build(DlrmHSTU, layers=layers, max_blind_share=1.0, **slots("all"))
    data, calls = batch([7, 3], [1, 1]), []
    plain = step(built, data)
    stack = built._hstu_transducer._stu_module
    hooked = {"stack": stack, "first layer": stack._stu_layers[0]}.get(place, stack._stu_layers[-1])
    hooked.register_forward_hook(lambda *_: calls.append(1))
    if layers == "fused":
        with pytest.raises(HpgrError, match="cannot run this step: hooks on"):
            step(built, data)
        return
    for got, wanted in zip(step(built, data)[0], plain[0], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert calls == [1]
