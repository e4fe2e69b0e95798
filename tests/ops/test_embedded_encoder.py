"""The embedded ranker on jagged tokens and kernels, against padded torch in double precision."""

import copy

import pytest
import torch
from torch import Tensor
from triton_device import DEVICE
from waits import Waits

from hpgr_plugin.components.attention_hooks import PreferenceGuidedSparseAttention
from hpgr_plugin.data.batch import Batch
from hpgr_plugin.hosts.embedded.model.hstu import HSTULayer, SequenceLayer
from hpgr_plugin.hosts.embedded.model.mtgr import MTGRLayer
from hpgr_plugin.hosts.embedded.model.ranker import HSTURanker
from hpgr_plugin.ops.dispatch import set_backends

HOOKS = {
    "dense": lambda: None,
    "per_candidate": lambda: PreferenceGuidedSparseAttention(top_k=3, sigma=1.0, recent=2),
    "per_candidate-pre": lambda: PreferenceGuidedSparseAttention(
        top_k=3, sigma=1.0, mask_position="pre"
    ),
    "shared_history": lambda: PreferenceGuidedSparseAttention(
        top_k=3, sigma=1.0, layout="shared_history"
    ),
}


def make_batch(histories: list[int], candidates: list[int]) -> Batch:
    """Random requests over years; candidates lie among the last items of their history."""
    rng = torch.Generator().manual_seed(0)

    def draw(high: int, size: int) -> Tensor:
        return torch.randint(0, high, (size,), generator=rng)

    times = [draw(10**9, n).sort().values for n in histories]
    ends = [int(time[n // 2]) if n else 0 for time, n in zip(times, histories, strict=True)]
    total, wanted = sum(histories), sum(candidates)
    return Batch(
        history_items=draw(40, total),
        history_timestamps=torch.cat(times),
        history_actions=draw(5, total),
        history_offsets=torch.tensor([0, *histories]).cumsum(0),
        candidate_items=draw(40, wanted),
        candidate_timestamps=torch.cat(
            [end + draw(10**9, n) for end, n in zip(ends, candidates, strict=True)]
        ),
        candidate_labels=draw(2, wanted).float(),
        candidate_offsets=torch.tensor([0, *candidates]).cumsum(0),
        users=torch.arange(len(histories)),
        user_features={"age": torch.arange(len(histories)) % 3},
    ).to(torch.device(DEVICE))


def make_model(layer: type[SequenceLayer], hook: str, *, num_layers: int = 3) -> HSTURanker:
    torch.manual_seed(0)
    model = HSTURanker(
        num_items=40,
        num_actions=5,
        vocabulary_digest="d",
        user_feature_sizes={"age": 3},
        embedding_dim=32,
        num_layers=num_layers,
        num_heads=2,
        layer=layer,
        max_history=16,
        dropout=0.0,
        attention_hook=HOOKS[hook](),
    )
    with torch.no_grad():  # a bias that is not zero
        for name, parameter in model.named_parameters():
            if "table" in name:
                parameter.normal_(std=0.3)
    return model.to(DEVICE)


def run(model: HSTURanker, batch: Batch, backend: str) -> list[Tensor]:
    """Logits and the gradients of all parameters."""
    set_backends({"hstu_attention": backend})
    try:
        logits = model(batch)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(
            logits, batch.candidate_labels.to(logits.dtype)
        )
        parameters = [p for p in model.parameters() if p.requires_grad]
        return [logits, *torch.autograd.grad(loss, parameters, allow_unused=True)]
    finally:
        set_backends()


@pytest.mark.parametrize("layer", [HSTULayer, MTGRLayer])
@pytest.mark.parametrize("hook", HOOKS)
def test_kernels_on_jagged_tokens_are_padded_torch(layer: type[SequenceLayer], hook: str) -> None:
    model, batch = make_model(layer, hook), make_batch([5, 0, 16, 1], [3, 2, 4, 0])
    exact = copy.deepcopy(model).double()

    ours, wanted = run(model, batch, "triton"), run(exact, batch, "torch")

    for a, b in zip(ours, wanted, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_single_layer_takes_short_sequences_too(backend: str) -> None:
    model = make_model(HSTULayer, "per_candidate", num_layers=1)
    batch = make_batch([5, 9], [2, 3])
    ours = run(model, batch, backend)
    wanted = run(copy.deepcopy(model).double(), batch, "naive")
    torch.testing.assert_close(ours[0].double(), wanted[0], rtol=1e-3, atol=1e-5)


def test_a_layer_without_sources_gets_every_token() -> None:
    """A layer of one's own that takes no `source`."""

    class Plain(HSTULayer):
        takes_source = False

    batch = make_batch([5, 9], [2, 3])
    ours = run(make_model(Plain, "per_candidate"), batch, "torch")
    wanted = run(make_model(HSTULayer, "per_candidate"), batch, "torch")
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("layer", [HSTULayer, MTGRLayer])
@pytest.mark.parametrize(("hook", "most"), [("dense", 0), ("shared_history", 1)])
def test_a_planned_step_waits_for_nothing(layer: type[SequenceLayer], hook: str, most: int) -> None:
    """On CUDA each of these operators would wait; a plan of PGSA has a size of its own."""
    model, batch = make_model(layer, hook), make_batch([5, 0, 16, 1], [3, 2, 4, 0])
    plan = model.plan_requests(batch)
    backends = {"hstu_attention": "triton", "preference_plan": "triton"}
    set_backends(backends)
    try:
        with Waits() as unplanned:
            model(batch)
        with Waits() as planned:
            model(batch, plan=plan).sum().backward()
    finally:
        set_backends()
    assert len(planned.seen) <= most
    assert len(unplanned.seen) > most
