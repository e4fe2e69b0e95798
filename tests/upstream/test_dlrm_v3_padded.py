"""The transducer's pass over padded copies of its inputs, against the pass itself; no graphs."""

from typing import Any

import pytest
import torch
from small_ranker import TABLE_DIM, WIDTH, batch, build, small_config, step
from torch import Tensor

from hpgr_plugin.components.attention_hooks import PreferenceGuidedSparseAttention
from hpgr_plugin.components.captured import CapturedFunction, load
from hpgr_plugin.components.positions import TimeAwarePositionalEncoder
from hpgr_plugin.components.sem import SessionEnhancementModule
from hpgr_plugin.hosts.dlrm_v3 import DlrmHSTU
from hpgr_plugin.hosts.dlrm_v3.padded import CapturedPasses

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

    def run(self, function: Any, inputs: Any, parameters: Any, key: Any) -> Tensor | None:
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
        return function(copies, dict(parameters))


def slots(kind: str) -> dict[str, Any]:
    torch.manual_seed(3)
    given: dict[str, Any] = {
        "attention_hook": PreferenceGuidedSparseAttention(
            top_k=3, sigma=1.0, recent=2, layout="per_candidate"
        )
    }
    if kind != "hook":
        given["positional_encoder"] = TimeAwarePositionalEncoder(
            embedding_dim=WIDTH, max_positions=128
        )
    if kind == "all":
        given["sem"] = SessionEnhancementModule(
            embedding_dim=TABLE_DIM, gap_seconds=900, num_heads=2
        )
    return given


def model(kind: str, *, padded: bool, **config: Any) -> Any:
    built = build(
        DlrmHSTU,
        dtype=torch.float64,
        layers="fused",
        max_blind_share=1.0,
        config=small_config(**config),
        **slots(kind),
    )
    if padded:
        passes = CapturedPasses(built.features, binding="hpgr.DlrmHSTU.capture")
        passes._function = Eager("hpgr.DlrmHSTU.capture")
        built._hstu_transducer.captured = passes
        built._hstu_transducer._can_capture = lambda rows: True
    return built


@pytest.mark.parametrize("later", [True, False], ids=["later", "inside"])
@pytest.mark.parametrize("kind", ["hook", "positions", "all"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_a_padded_pass_is_the_pass(shape: Any, kind: str, later: bool) -> None:
    data = batch(*shape, later=later)
    padded = model(kind, padded=True)
    mine, reference = step(padded, data), step(model(kind, padded=False), data)
    assert padded._hstu_transducer.captured._function.passes == 1
    for got, wanted in zip(mine[0], reference[0], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
    assert mine[1].keys() == reference[1].keys()
    for name, wanted in reference[1].items():
        torch.testing.assert_close(
            mine[1][name], wanted, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_similar_batches_share_their_sizes() -> None:
    seen = set()
    built = model("positions", padded=True)
    run = built._hstu_transducer.captured._function.run

    def note(function: Any, inputs: Any, parameters: Any, key: Any) -> Any:
        seen.add((key, tuple((name, given.size) for name, given in inputs.items())))
        return run(function, inputs, parameters, key)

    built._hstu_transducer.captured._function.run = note
    for seed in range(10):
        step(built, batch([60 + seed, 1, 30, 9], [1, 1, 1, 1], seed=seed))
    assert 1 <= len(seen) <= 3


@pytest.mark.parametrize("mode", ["evaluation", "pre", "shared"])
def test_other_passes_are_not_padded(mode: str) -> None:
    built = model("hook", padded=True)
    hook = built.attention_hook
    if mode == "evaluation":
        built.eval()
    elif mode == "pre":
        hook.mask_position = "pre"
    else:
        hook.layout = "shared_history"
    built(*batch([7, 3], [1, 1]))
    assert not hasattr(built._hstu_transducer.captured._function, "passes")
