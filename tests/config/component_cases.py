"""What every component of the registry must do, whatever it is. Checked in a small ranker."""

import inspect
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import NamedTuple

import torch
from ranker_checks import check_candidates_are_independent, enlarge
from torch import Tensor, nn

from hpgr_plugin.config.registry import ENCODER, FEATURES, LAYER, RARE, Entry, load
from hpgr_plugin.data import Batch
from hpgr_plugin.hosts.embedded.model.ranker import HSTURanker

NUM_ITEMS, NUM_ACTIONS, MAX_HISTORY = 40, 5, 16
HISTORIES, CANDIDATES = [5, 0, 1, 16, 9], [3, 2, 1, 4, 2]
# Other forms of a component that every check covers too.
FORMS: Mapping[str, list[dict[str, object]]] = {
    "PreferenceGuidedSparseAttention": [{"score": "cosine"}, {"layout": "shared_history"}],
    "RandomItems": [{"layout": "shared_history"}],
    "SessionEnhancementModule": [{"session_tokens": True}, {"own_session": True}],
    "TimeAwarePositionalEncoder": [{"form": "relative"}],
}
CLASSES = (LAYER, ENCODER, FEATURES, RARE)  # slots that take a class, which the ranker builds
# Values of constructor arguments, by name; all others keep their defaults. A required argument of
# another name needs a line here.
ARGUMENTS = {
    "embedding_dim": 8,
    "num_heads": 2,
    "max_positions": MAX_HISTORY + 1,
    "max_history": MAX_HISTORY,
    "causal": True,
    "top_k": 2,
    "keep": 3,
    "sigma": 0.5,
    "alpha": 1.2,
}


def make_batch(histories: list[int] = HISTORIES, candidates: list[int] = CANDIDATES) -> Batch:
    """Users whose candidates lie among their history, which has several sessions."""
    rng = torch.Generator().manual_seed(1)

    def times(lengths: list[int]) -> Tensor:
        rows = [torch.randint(0, 20_000, (n,), generator=rng).sort().values for n in lengths]
        return torch.cat(rows)

    total, wanted = sum(histories), sum(candidates)
    return Batch(
        history_items=torch.randint(0, NUM_ITEMS, (total,), generator=rng),
        history_timestamps=times(histories),
        history_actions=torch.randint(0, NUM_ACTIONS, (total,), generator=rng),
        history_offsets=torch.tensor([0, *histories]).cumsum(0),
        candidate_items=torch.randint(0, NUM_ITEMS, (wanted,), generator=rng),
        candidate_timestamps=times(candidates),
        candidate_labels=torch.ones(wanted),
        candidate_offsets=torch.tensor([0, *candidates]).cumsum(0),
        users=torch.arange(len(histories)),
        user_features={},
    )


class Variant(NamedTuple):
    """A component with other arguments than its defaults."""

    entry: Entry
    arguments: Mapping[str, object] = MappingProxyType({})

    @property
    def slot(self) -> str | None:
        return self.entry.slot

    @property
    def target(self) -> str:
        return self.entry.target

    @property
    def name(self) -> str:
        return "-".join([self.entry.name, *map(str, self.arguments.values())])


def variants_of(entry: Entry) -> list[Variant]:
    """The component as it is by default, and its other forms."""
    return [Variant(entry), *(Variant(entry, form) for form in FORMS.get(entry.name, ()))]


def build_component(case: Variant) -> nn.Module:
    """An instance of the component with small sizes."""
    component = load(case.target)
    known = inspect.signature(component).parameters
    small = {name: value for name, value in ARGUMENTS.items() if name in known}
    return component(**{**small, **case.arguments})


def ranker_with(case: Variant) -> HSTURanker:
    """A small ranker in float64 with this component in its slot, or with this encoder layer."""
    torch.manual_seed(0)
    component = load(case.target) if case.slot in CLASSES else build_component(case)
    model = HSTURanker(
        num_items=NUM_ITEMS,
        num_actions=NUM_ACTIONS,
        vocabulary_digest="",
        item_counts=torch.arange(NUM_ITEMS),
        embedding_dim=8,
        num_layers=2,
        num_heads=2,
        max_history=MAX_HISTORY,
        dropout=0.0,
        **{case.slot: [component] if case.slot == FEATURES else component},
    ).double()
    enlarge(model)
    return model


def component_of(model: HSTURanker, case: Variant) -> nn.Module:
    return model.encoder if case.slot == LAYER else getattr(model, case.slot)


def check_independence(case: Variant) -> None:
    """Another candidate's item changes nothing for a candidate."""
    check_candidates_are_independent(ranker_with(case).eval(), make_batch())


def check_gradients(case: Variant) -> None:
    """Every parameter of the component, and the item table, receives a finite gradient."""
    model = ranker_with(case).train()
    model(make_batch()).square().sum().backward()
    named = dict(component_of(model, case).named_parameters())
    for name, parameter in {**named, "item_table": model.item_table.weight}.items():
        assert parameter.grad is not None, f"{name} receives no gradient"
        assert torch.isfinite(parameter.grad).all(), f"{name} has a gradient that is not finite"
    assert model.item_table.weight.grad.abs().sum() > 0
    assert not named or any(parameter.grad.abs().sum() > 0 for parameter in named.values())


def check_empty_history(case: Variant) -> None:
    """Users without history are ranked."""
    model = ranker_with(case).eval()
    logits = model(make_batch([0, 0], [2, 1]))
    assert logits.shape == (3,)
    assert torch.isfinite(logits).all()


def check_determinism(case: Variant) -> None:
    """Two trainings with one seed begin with the same numbers."""
    results = []
    for _ in range(2):
        model = ranker_with(case).train()
        results.append([model(make_batch()) for _ in range(3)])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def check_future_is_hidden(case: Variant) -> None:
    """Other items at or after a candidate's time change nothing for it, but do for later ones."""
    model, batch = ranker_with(case).eval(), make_batch()
    before = model(batch)
    changed = batch.history_items.clone()
    first_changed = torch.full((len(HISTORIES),), torch.iinfo(torch.int64).max)
    for user, (start, end) in enumerate(batch.history_offsets.unfold(0, 2, 1).tolist()):
        middle = (start + end + 1) // 2
        if middle < end:
            changed[middle:end] = (changed[middle:end] + 7) % NUM_ITEMS
            first_changed[user] = batch.history_timestamps[middle]
    after = model(replace(batch, history_items=changed))
    owner = torch.arange(len(CANDIDATES)).repeat_interleave(torch.tensor(CANDIDATES))
    earlier = batch.candidate_timestamps <= first_changed[owner]
    assert (earlier & (batch.history_offsets.diff()[owner] > 1)).any()
    torch.testing.assert_close(after[earlier], before[earlier], rtol=0, atol=1e-12)
    assert not torch.equal(after[~earlier], before[~earlier])


CHECKS = (
    check_gradients,
    check_empty_history,
    check_determinism,
    check_future_is_hidden,
    check_independence,
)
