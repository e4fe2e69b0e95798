"""The embedded host's ranker: who sees whom, both PGSA scopes, slots."""

from dataclasses import replace

import pytest
import torch
from ranker_checks import check_candidates_are_independent, enlarge
from torch import Tensor, nn

from hpgr_plugin.components.attention_hooks import (
    AttentionHook,
    HookInputs,
    PreferenceGuidedSparseAttention,
    StochasticLength,
)
from hpgr_plugin.components.positions import TimeAwarePositionalEncoder, time_aware_index
from hpgr_plugin.components.sem import SessionEnhancementModule
from hpgr_plugin.data.batch import Batch
from hpgr_plugin.errors import HpgrError
from hpgr_plugin.hosts.embedded.model.hstu import HSTULayer
from hpgr_plugin.hosts.embedded.model.mtgr import MTGRLayer
from hpgr_plugin.hosts.embedded.model.ranker import HSTURanker
from hpgr_plugin.hosts.embedded.model.rivals.dnn import DNN
from hpgr_plugin.hosts.embedded.model.token_features import CalendarFeatures
from hpgr_plugin.hosts.embedded.model.tokens import RequestIndex, SequenceIndex
from hpgr_plugin.hosts.slots import SlotError
from hpgr_plugin.ops.preference_plan import PreferencePlan

NUM_ITEMS, NUM_ACTIONS, MAX_HISTORY = 40, 5, 16


def make_batch(
    histories: list[int], candidates: list[int], *, seed: int = 0, features: bool = False
) -> Batch:
    """Random requests with ties in time; candidates lie among the last history items."""
    rng = torch.Generator().manual_seed(seed)
    times, candidate_times = [], []
    for length, count in zip(histories, candidates, strict=True):
        history = torch.randint(0, 4000, (length,), generator=rng).sort().values * 3
        times.append(history)
        start = int(history[length // 2]) if length else 0
        candidate_times.append(
            start + torch.randint(0, 9000, (count,), generator=rng).sort().values
        )
    total, wanted = sum(histories), sum(candidates)
    users = torch.arange(len(histories))
    return Batch(
        history_items=torch.randint(0, NUM_ITEMS, (total,), generator=rng),
        history_timestamps=torch.cat(times),
        history_actions=torch.randint(0, NUM_ACTIONS, (total,), generator=rng),
        history_offsets=torch.tensor([0, *histories]).cumsum(0),
        candidate_items=torch.randint(0, NUM_ITEMS, (wanted,), generator=rng),
        candidate_timestamps=torch.cat(candidate_times),
        candidate_labels=torch.randint(0, 2, (wanted,), generator=rng).float(),
        candidate_offsets=torch.tensor([0, *candidates]).cumsum(0),
        users=users,
        user_features={"age": users % 3, "job": users % 2} if features else {},
    )


def make_model(**overrides: object) -> HSTURanker:
    torch.manual_seed(0)
    settings: dict = {
        "num_items": NUM_ITEMS,
        "num_actions": NUM_ACTIONS,
        "vocabulary_digest": "d",
        "embedding_dim": 8,
        "num_layers": 3,
        "num_heads": 2,
        "max_history": MAX_HISTORY,
        "dropout": 0.0,
    }
    model = HSTURanker(**{**settings, **overrides}).double().eval()
    enlarge(model)
    return model


BATCH = {"histories": [5, 0, 1, 16, 9], "candidates": [3, 2, 1, 4, 2]}
HOOKS = {
    "dense": lambda: None,
    "sequence": lambda: PreferenceGuidedSparseAttention(top_k=3, sigma=1.0, recent=2),
    "shared_history": lambda: PreferenceGuidedSparseAttention(
        top_k=3, sigma=1.0, layout="shared_history"
    ),
}


@pytest.mark.parametrize("layer", [HSTULayer, MTGRLayer])
@pytest.mark.parametrize("hook", HOOKS)
def test_candidates_do_not_see_each_other(layer: type, hook: str) -> None:
    model = make_model(layer=layer, attention_hook=HOOKS[hook]())
    check_candidates_are_independent(model, make_batch(**BATCH))


@pytest.mark.parametrize("layer", [HSTULayer, MTGRLayer])
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("with_sem", [False, True])
def test_the_future_is_hidden(layer: type, hook: str, with_sem: bool) -> None:
    sem = SessionEnhancementModule(embedding_dim=8, num_heads=2, causal=True) if with_sem else None
    model = make_model(layer=layer, attention_hook=HOOKS[hook](), sem=sem)
    batch = make_batch(**BATCH)
    before = model(batch)
    for row in range(len(batch.history_items)):
        user = int(torch.searchsorted(batch.history_offsets, row, right=True)) - 1
        owner = torch.repeat_interleave(batch.users, batch.candidate_offsets.diff())
        hidden = (owner == user) & (batch.candidate_timestamps <= batch.history_timestamps[row])
        items, actions = batch.history_items.clone(), batch.history_actions.clone()
        items[row] = (items[row] + 7) % NUM_ITEMS
        actions[row] = (actions[row] + 1) % NUM_ACTIONS
        after = model(replace(batch, history_items=items, history_actions=actions))
        untouched = hidden | (owner != user)
        torch.testing.assert_close(after[untouched], before[untouched], rtol=0, atol=1e-12)


def test_a_visible_item_matters() -> None:
    model = make_model()
    batch = make_batch([6], [1])
    batch.candidate_timestamps[:] = batch.history_timestamps[-1] + 1
    items = batch.history_items.clone()
    items[0] = (items[0] + 1) % NUM_ITEMS
    assert model(batch)[0] != model(replace(batch, history_items=items))[0]


@pytest.mark.parametrize("hook", HOOKS)
def test_many_candidates_score_as_each_alone(hook: str) -> None:
    model = make_model(attention_hook=HOOKS[hook](), user_feature_sizes={"age": 3, "job": 2})
    batch = make_batch([16], [4], features=True)
    together = model(batch)
    for c in range(4):
        alone = replace(
            batch,
            candidate_items=batch.candidate_items[c : c + 1],
            candidate_timestamps=batch.candidate_timestamps[c : c + 1],
            candidate_offsets=torch.tensor([0, 1]),
        )
        torch.testing.assert_close(model(alone)[0], together[c], rtol=0, atol=1e-12)


class WholeHistory(AttentionHook):
    """PGSA's weights on every visible row, zeros kept: the dense masked stack."""

    def __init__(self, sparse: PreferenceGuidedSparseAttention) -> None:
        super().__init__()
        self.sparse = sparse
        self.layout = sparse.layout
        self.mask_position = sparse.mask_position

    def plan(self, inputs: HookInputs) -> PreferencePlan:
        kept = self.sparse.plan(inputs)
        everything = PreferenceGuidedSparseAttention(top_k=0, recent=10_000).plan(inputs)
        weights = torch.zeros(len(everything.index), dtype=torch.float64)
        for row in range(len(kept.offsets) - 1):
            wanted = kept.index[kept.offsets[row] : kept.offsets[row + 1]]
            start, stop = everything.offsets[row], everything.offsets[row + 1]
            place = start + torch.searchsorted(everything.index[start:stop], wanted)
            weights[place] = kept.weights[kept.offsets[row] : kept.offsets[row + 1]].double()
        return everything._replace(weights=weights)


@pytest.mark.parametrize("form", ["absolute", "relative"])
@pytest.mark.parametrize("mask_position", ["post", "pre"])
@pytest.mark.parametrize("seed", range(3))
def test_shortened_sequences_equal_the_dense_masked_stack(
    mask_position: str, seed: int, form: str
) -> None:
    """Forward and every gradient, all layers, with relative bias and actions."""
    batch = make_batch([16, 0, 1, 12, 9], [3, 2, 1, 4, 2], seed=seed)
    results = []
    for dense in (False, True):
        hook = PreferenceGuidedSparseAttention(
            top_k=3, sigma=0.6, recent=2, mask_position=mask_position
        )
        positions = TimeAwarePositionalEncoder(
            embedding_dim=8, max_positions=MAX_HISTORY + 1, form=form
        )
        model = make_model(
            attention_hook=WholeHistory(hook) if dense else hook, positional_encoder=positions
        )
        logits = model(batch)
        logits.pow(2).sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append((logits, gradients))
    (short, short_gradients), (full, full_gradients) = results
    torch.testing.assert_close(short, full, rtol=0, atol=1e-10)
    assert short_gradients.keys() == full_gradients.keys()
    for name, gradient in full_gradients.items():
        torch.testing.assert_close(short_gradients[name], gradient, rtol=1e-10, atol=1e-10)


def test_candidate_scope_with_every_item_an_anchor_is_the_dense_model() -> None:
    batch = make_batch(**BATCH)
    hook = PreferenceGuidedSparseAttention(top_k=MAX_HISTORY, layout="shared_history")
    torch.testing.assert_close(make_model(attention_hook=hook)(batch), make_model()(batch))


def test_stochastic_length_is_for_training_only() -> None:
    model = make_model(attention_hook=StochasticLength(alpha=1.2, max_history=MAX_HISTORY))
    batch = make_batch([16, 16, 16], [1, 1, 1])
    torch.testing.assert_close(model(batch), make_model()(batch))
    model.train()
    assert not torch.allclose(model(batch), make_model()(batch))


def test_context_and_item_features_are_read() -> None:
    batch = make_batch(**BATCH, features=True)
    model = make_model(
        user_feature_sizes={"age": 3, "job": 2},
        item_feature_codes={"genre": torch.arange(NUM_ITEMS) % 4},
    )
    before = model(batch)
    changed = {"age": (batch.user_features["age"] + 1) % 3, "job": batch.user_features["job"]}
    assert not torch.allclose(model(replace(batch, user_features=changed)), before)
    with torch.no_grad():
        model.item_features.tables["genre"].weight.add_(torch.randn(8, dtype=torch.float64))
    assert not torch.allclose(model(batch), before)


def test_mtgr_static_history_is_fully_connected() -> None:
    """An early token's output depends on a later static one, unlike in HSTU's causal stack."""
    batch = make_batch([6], [1])
    batch.candidate_timestamps[:] = batch.history_timestamps[-1] + 1
    difference = {}
    for layer in (HSTULayer, MTGRLayer):
        model = make_model(layer=layer, num_layers=2)
        seen: list[Tensor] = []
        model.encoder.layers[0].register_forward_hook(lambda *a, seen=seen: seen.append(a[2]))
        items = batch.history_items.clone()
        items[5] = (items[5] + 1) % NUM_ITEMS
        model(batch)
        model(replace(batch, history_items=items))
        difference[layer] = (seen[0][0] - seen[1][0]).abs().max().item()
    assert difference[HSTULayer] == 0.0
    assert difference[MTGRLayer] > 1e-6


@pytest.mark.parametrize(
    ("slot", "kind"),
    [
        ("sem", "SessionEnhancementModule"),
        ("positional_encoder", "TimeAwarePositionalEncoder"),
        ("attention_hook", "PreferenceGuidedSparseAttention"),
    ],
)
def test_a_slot_with_the_wrong_kind_of_thing(slot: str, kind: str) -> None:
    with pytest.raises(SlotError, match=rf"hpgr.HSTURanker.{slot} takes .*{kind}.*got Linear"):
        make_model(**{slot: nn.Linear(2, 2)})


@pytest.mark.parametrize("hook", HOOKS)
def test_the_future_is_shown_on_demand(hook: str) -> None:
    """`hide_future=False`: a later item changes an earlier candidate's score."""
    positions = TimeAwarePositionalEncoder(
        embedding_dim=8, max_positions=MAX_HISTORY + 1, hide_future=False
    )
    model = make_model(attention_hook=HOOKS[hook](), positional_encoder=positions)
    batch = make_batch([6], [1])
    batch.candidate_timestamps[:] = batch.history_timestamps[2]
    items = batch.history_items.clone()
    items[5] = (items[5] + 1) % NUM_ITEMS
    assert model(batch)[0] != model(replace(batch, history_items=items))[0]


def test_a_training_whose_candidates_see_no_history_stops() -> None:
    """All times equal, as in a log without times of requests: everything would be hidden."""
    model, batch = make_model().train(), make_batch(**BATCH)
    blind = replace(
        batch,
        history_timestamps=torch.zeros_like(batch.history_timestamps),
        candidate_timestamps=torch.zeros_like(batch.candidate_timestamps),
    )
    with pytest.raises(HpgrError, match=r"see none of it.*hide_future = False"):
        model(blind)
    make_model(max_blind_share=1.0).train()(blind)


def relative() -> TimeAwarePositionalEncoder:
    return TimeAwarePositionalEncoder(embedding_dim=8, form="relative")


def test_the_relative_form_of_eq_4_has_no_table() -> None:
    """What is left is the bias: without it the order of a history means nothing."""
    model, batch = make_model(positional_encoder=relative()), make_batch([6], [1])
    batch.history_timestamps[:] = 0
    batch.candidate_timestamps[:] = 1
    swapped = batch.history_items[[1, 0, 2, 3, 4, 5]], batch.history_actions[[1, 0, 2, 3, 4, 5]]
    other = replace(batch, history_items=swapped[0], history_actions=swapped[1])
    assert model(batch)[0] != model(other)[0]
    with torch.no_grad():
        model.encoder.bias.position_table.zero_()
    model.encoder.layers = model.encoder.layers[-1:]  # causality is order too
    torch.testing.assert_close(model(other), model(batch), rtol=0, atol=1e-12)


def test_the_bias_reads_the_time_aware_index() -> None:
    """`Index(C)` for a candidate, `Index(j)` for what it sees."""
    batch = make_batch(**BATCH)
    index = RequestIndex.of(batch, hide_future=True)
    sequence = SequenceIndex.of(batch, index, context_len=0, dynamic_mask=False)
    numbers, of_candidates = time_aware_index(
        batch.history_timestamps,
        batch.history_offsets,
        batch.candidate_timestamps,
        batch.candidate_offsets,
    )
    lengths = batch.history_offsets.diff()
    numbers = numbers.split(lengths[index.candidate_users].tolist())
    for c, user in enumerate(index.candidate_users.tolist()):
        positions = sequence.marks[0, sequence.offsets[user] : sequence.offsets[user + 1]]
        seen = int(index.visible[c])
        assert torch.equal(positions[:seen], numbers[c][:seen])
        own = int(lengths[user]) + c - int(batch.candidate_offsets[user])
        assert positions[own] == of_candidates[c]


def test_a_shown_future_is_numbered_after_the_candidate() -> None:
    batch = make_batch([6], [1])
    batch.candidate_timestamps[:] = batch.history_timestamps[2]
    index = RequestIndex.of(batch, hide_future=False)
    numbers, of_candidates = time_aware_index(
        batch.history_timestamps,
        batch.history_offsets,
        batch.candidate_timestamps,
        batch.candidate_offsets,
    )
    assert torch.equal(index.history_positions, numbers)
    assert torch.equal(index.earlier + 1, of_candidates)


@pytest.mark.parametrize("hook", HOOKS)
def test_the_relative_form_is_shift_invariant(hook: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same requests 1000 places and a year later score the same."""
    model = make_model(attention_hook=HOOKS[hook](), positional_encoder=relative())
    batch = make_batch(**BATCH)
    before = model(batch)
    of = RequestIndex.of

    def further(*args: object, **kwargs: object) -> RequestIndex:
        index = of(*args, **kwargs)
        return index._replace(
            history_positions=index.history_positions + 1000, earlier=index.earlier + 1000
        )

    monkeypatch.setattr(RequestIndex, "of", further)
    year = 365 * 24 * 3600
    later = replace(
        batch,
        history_timestamps=batch.history_timestamps + year,
        candidate_timestamps=batch.candidate_timestamps + year,
    )
    assert torch.equal(model(later), before)


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        (
            {"positional_encoder": relative(), "relative_bias": False},
            r"form = 'relative' needs hpgr.HSTURanker.relative_bias = True",
        ),
        (
            {"encoder": DNN, "attention_hook": HOOKS["sequence"]()},
            r"attention_hook must be None where hpgr.HSTURanker.encoder = @hpgr.DNN",
        ),
        (
            {"encoder": DNN, "positional_encoder": relative()},
            r"positional_encoder must be None where hpgr.HSTURanker.encoder = @hpgr.DNN",
        ),
        ({"encoder": HSTULayer}, r"hpgr.HSTURanker.encoder takes classes .*RivalEncoder"),
        ({"token_features": [DNN]}, r"hpgr.HSTURanker.token_features takes classes"),
        ({"token_features": [5]}, r"hpgr.HSTURanker.token_features takes classes .* got 5"),
    ],
)
def test_slots_that_do_not_fit_each_other(slots: dict, message: str) -> None:
    with pytest.raises(SlotError, match=message) as raised:
        make_model(**slots)
    assert "\n" not in str(raised.value)


def test_several_token_features_are_read() -> None:
    batch = make_batch(**BATCH)
    model = make_model(token_features=[CalendarFeatures, CalendarFeatures])
    assert len(model.token_features) == 2
    later = replace(batch, candidate_timestamps=batch.candidate_timestamps + 3600)
    assert not torch.allclose(model(later), model(batch))
