"""Masked item modelling: which items are masked, what leaks, and what is computed."""

import copy
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from waits import Waits

from hpgr_plugin.components.mim import MaskedItemModel, choose_masked
from hpgr_plugin.components.sem import SessionEnhancementModule
from hpgr_plugin.components.sessions import partition_sessions
from hpgr_plugin.data import SequenceBatch
from hpgr_plugin.errors import HpgrError
from hpgr_plugin.hosts.embedded.train.planned import SequencePlanner

V, D = 30, 8
LENGTHS = [0, 1, 23, 2, 0, 40, 5, 1, 3]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def histories(seed=0, lengths=LENGTHS):
    g = rng(seed)
    offsets = torch.tensor([0, *accumulate(lengths)])
    timestamps = torch.cat([torch.randint(0, 2800, (n,), generator=g).cumsum(0) for n in lengths])
    return torch.randint(0, V, (sum(lengths),), generator=g), offsets, timestamps


def build(with_sem=True, **settings) -> MaskedItemModel:
    torch.manual_seed(1)
    sem = SessionEnhancementModule(embedding_dim=D, num_heads=2, causal=False) if with_sem else None
    model = MaskedItemModel(num_items=V, embedding_dim=D, num_heads=2, sem=sem, **settings)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model.double()


# Which items are masked ---------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.01, 0.2, 0.5, 0.99])
@pytest.mark.parametrize("masking", ["item", "session", "mixed"])
def test_at_least_one_and_never_all(masking, ratio):
    for seed in range(10):
        _, offsets, timestamps = histories(seed)
        sessions = partition_sessions(timestamps, offsets)
        masked = choose_masked(
            offsets, sessions, mask_ratio=ratio, masking=masking, generator=rng(seed)
        )
        for n, row in zip(LENGTHS, masked.split(LENGTHS), strict=True):
            if n < 2:
                assert row.sum() == 0
            else:
                assert 1 <= row.sum() <= n - 1


def test_item_masking_meets_the_ratio_and_is_even():
    n = 12
    offsets, timestamps = torch.tensor([0, n]), torch.arange(n) // 5 * 9999
    sessions = partition_sessions(timestamps, offsets)
    g = rng()
    draws = torch.stack(
        [
            choose_masked(offsets, sessions, mask_ratio=0.3, masking="item", generator=g)
            for _ in range(2000)
        ]
    ).float()
    assert set(draws.sum(1).unique().tolist()) == {3.0, 4.0}
    assert (draws.mean(0) - 0.3).abs().max() < 0.05


def test_session_masking_takes_whole_sessions():
    sizes = [2, 3, 1, 4, 2, 3, 5]
    timestamps = torch.cat([torch.full((n,), 10_000 * k) for k, n in enumerate(sizes)])
    offsets = torch.tensor([0, sum(sizes)])
    sessions = partition_sessions(timestamps, offsets)
    g, seen, shares = rng(), torch.zeros(len(sizes)), []
    for _ in range(500):
        masked = choose_masked(offsets, sessions, mask_ratio=0.4, masking="session", generator=g)
        per_session = torch.stack([row.float().mean() for row in masked.split(sizes)])
        assert set(per_session.tolist()) <= {0.0, 1.0}
        seen += per_session
        shares.append(masked.float().mean())
    assert seen.min() > 0
    assert abs(torch.stack(shares).mean() - 0.4) < 0.05


def test_session_masking_inside_a_session_over_twice_the_budget():
    timestamps = torch.tensor([0] * 10 + [10_000] * 10)
    offsets = torch.tensor([0, 20])
    sessions = partition_sessions(timestamps, offsets)
    for seed in range(20):
        masked = choose_masked(
            offsets, sessions, mask_ratio=0.2, masking="session", generator=rng(seed)
        )
        assert sorted(row.sum().item() for row in masked.split(10)) == [0, 4]


def test_mixed_masking_does_both():
    timestamps = torch.tensor(([0] * 10 + [10_000] * 10) * 200)
    offsets = torch.arange(0, 4001, 20)
    sessions = partition_sessions(timestamps, offsets)
    masked = choose_masked(offsets, sessions, mask_ratio=0.2, masking="mixed", generator=rng())
    one_session = (masked.view(200, 2, 10).sum(2) == 0).any(1).float().mean()
    assert 0.4 < one_session < 0.75  # half of the users, and by chance some of the others


def test_80_10_10():
    items = torch.zeros(20_000, dtype=torch.int64)
    corruption = build().corrupt(
        items, torch.tensor([0, 20_000]), torch.zeros_like(items), generator=rng()
    )
    count = corruption.masked.sum()
    assert count == 4000
    assert abs(corruption.hidden.sum() / count - 0.8) < 0.02
    replaced = corruption.items != items
    assert not (replaced & corruption.hidden).any()
    assert not (replaced & ~corruption.masked).any()
    assert abs(replaced.sum() / count - 0.1 * (V - 1) / V) < 0.02


def test_the_generator_decides():
    model, batch = build(), histories()
    first, again, other = (model(*batch, generator=rng(s)).loss for s in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("limit", [V, V - 1])
@pytest.mark.parametrize("with_sem", [True, False])
def test_a_plan_made_before_the_step_changes_no_bit(with_sem, limit):
    model, batch = build(with_sem, full_softmax_max_items=limit, num_sampled=64), histories()

    def step(**arguments):
        output = model(*batch, **arguments)
        grads = torch.autograd.grad(output.loss, tuple(model.parameters()))
        return [output.loss, output.accuracy, *grads]

    planned = step(plan=model.plan(*batch, generator=rng(3)))
    for here, before in zip(step(generator=rng(3)), planned, strict=True):
        assert torch.equal(here, before)


def test_a_planned_step_waits_for_nothing():
    """On CUDA each of these operators would make the host wait for the device."""
    counts = {}
    for with_sem in (False, True):
        model, batch = build(with_sem), histories()
        plan = model.plan(*batch, generator=rng())
        with Waits() as planned:
            model(*batch, plan=plan).loss.backward()
        with Waits() as unplanned:
            model(*batch, generator=rng())
        counts[with_sem] = len(planned.seen), len(unplanned.seen)
    assert counts[False][0] == 0
    assert counts[False][1] > 5
    # The sessions are pooled in buckets here, and by a kernel on CUDA.
    assert counts[True][0] <= 4


# What is computed ---------------------------------------------------------------------------


@pytest.mark.parametrize("mask_before_sem", [True, False])
@pytest.mark.parametrize("output_bias", [True, False])
def test_loss_is_the_cross_entropy_at_masked_items(output_bias, mask_before_sem):
    model = build(output_bias=output_bias, mask_before_sem=mask_before_sem)
    items, offsets, timestamps = histories()
    corruption = model.corrupt(items, offsets, timestamps, generator=rng(5))
    out = model(items, offsets, timestamps, generator=rng(5))
    encoded = model.encode(items, corruption, offsets, timestamps)[corruption.masked]
    scores = F.linear(encoded, model.item_table.weight, model.output_bias)
    targets = items[corruption.masked]
    torch.testing.assert_close(out.loss, F.cross_entropy(scores, targets))
    torch.testing.assert_close(out.accuracy.double(), (scores.argmax(1) == targets).double().mean())
    assert out.num_masked == corruption.masked.sum()


def test_users_do_not_see_each_other():
    model = build()
    items, offsets, timestamps = histories()
    corruption = model.corrupt(items, offsets, timestamps, generator=rng())
    together = model.encode(items, corruption, offsets, timestamps)
    for start, end in zip(offsets.tolist(), offsets.tolist()[1:], strict=False):
        own = slice(start, end)
        alone = model.encode(
            items[own],
            type(corruption)(*(x[own] for x in corruption)),
            torch.tensor([0, end - start]),
            timestamps[own],
        )
        torch.testing.assert_close(alone, together[own], rtol=0, atol=1e-12)


FEATURES = {
    "feature_gate_tau": 3.0,
    "item_feature_codes": {"genre": torch.arange(V) % 4},
    "item_events": torch.arange(V) ** 2,
}
ON_ACTION = {"condition_on_action": True, "num_actions": 5}


@pytest.mark.parametrize("options", [{}, ON_ACTION, FEATURES], ids=["plain", "action", "features"])
@pytest.mark.parametrize("masking", ["item", "session", "mixed"])
@pytest.mark.parametrize("with_sem", [True, False])
def test_the_identity_of_a_masked_item_changes_nothing(with_sem, masking, options):
    model = build(with_sem=with_sem, masking=masking, random_item_share=0.2, **options)  # none stay
    items, offsets, timestamps = histories()
    given = {"actions": items % 5} if options is ON_ACTION else {}
    corruption = model.corrupt(items, offsets, timestamps, generator=rng())
    before = model.encode(items, corruption, offsets, timestamps, **given)
    for i in corruption.masked.nonzero().squeeze(1).tolist():
        other = items.clone()
        other[i] = (other[i] + 1) % V
        again = model.corrupt(other, offsets, timestamps, generator=rng())
        assert torch.equal(again.masked, corruption.masked)
        assert torch.equal(model.encode(other, again, offsets, timestamps, **given), before)


@pytest.mark.parametrize("with_sem", [True, False])
def test_features_speak_for_rare_items_as_input_and_in_the_softmax(with_sem):
    model, plain = build(with_sem, **FEATURES), build(with_sem)
    gate = (FEATURES["item_events"] / (FEATURES["item_events"] + 3.0)).double().unsqueeze(1)
    genres = model.item_features.tables["genre"].weight[torch.arange(V) % 4]
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("item_features")}
    state["item_table.weight"] = gate * model.item_table.weight + (1 - gate) * genres
    plain.load_state_dict(state)
    batch = histories()
    got, want = (m(*batch, generator=rng()).loss for m in (model, plain))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    got.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())


def test_the_gate_needs_features():
    for missing in ({"item_feature_codes": {}}, {"item_events": None}):
        with pytest.raises(HpgrError, match="must be 0 for a log without item features"):
            build(**{**FEATURES, **missing})
    with pytest.raises(HpgrError, match=r"item_events must be \[30\]"):
        build(**{**FEATURES, "item_events": torch.ones(3)})
    with pytest.raises(HpgrError, match="feature_gate_tau"):
        build(feature_gate_tau=-1.0)
    unused = {**FEATURES, "feature_gate_tau": 0.0}
    assert build(**unused).state_dict().keys() == build().state_dict().keys()


def test_the_action_of_a_masked_item_is_read():
    """And that of a neighbour, as every position's is."""
    model = build(condition_on_action=True, num_actions=5)
    items, offsets, timestamps = histories()
    actions = items % 5
    corruption = model.corrupt(items, offsets, timestamps, generator=rng())
    before = model.encode(items, corruption, offsets, timestamps, actions=actions)
    i = int(corruption.hidden.nonzero()[-1])
    other = actions.clone()
    other[i] = (other[i] + 1) % 5
    changed = model.encode(items, corruption, offsets, timestamps, actions=other) != before
    owner = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    assert torch.equal(changed.any(1), owner == owner[i])
    with pytest.raises(ValueError, match="need actions, got None"):
        model(items, offsets, timestamps)


@pytest.mark.parametrize("limit", [V, V - 1])
def test_actions_weigh_the_loss(limit):
    sampled = {"full_softmax_max_items": limit, "num_sampled": 64}
    plain = build(**sampled)
    model = build(action_weights=[0.0, 1.0, 3.0], num_actions=3, **sampled)
    assert model.state_dict().keys() == plain.state_dict().keys()
    items, offsets, timestamps = histories()
    actions = torch.arange(len(items)) % 3
    plan = plain.plan(items, offsets, timestamps, generator=rng())
    by_action = []
    for action in range(3):
        places = plan.places[actions[plan.places] == action]
        loss = plain(items, offsets, timestamps, plan=plan._replace(places=places)).loss
        by_action.append((loss, len(places)))
    want = sum(w * n * loss for w, (loss, n) in zip([0, 1, 3], by_action, strict=True))
    want = want / sum(w * n for w, (_, n) in zip([0, 1, 3], by_action, strict=True))
    got = model(items, offsets, timestamps, actions=actions, plan=plan).loss
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


def test_the_options_are_off_by_default():
    names = MaskedItemModel(num_items=V, embedding_dim=D).state_dict()
    assert not [name for name in names if "action" in name]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"condition_on_action": True}, "need num_actions"),
        ({"action_weights": [1.0], "num_actions": 2}, "action_weights must be 2 numbers"),
        ({"action_weights": [1.0, -1.0], "num_actions": 2}, "of 0 or more"),
        ({"action_weights": [0.0, 0.0], "num_actions": 2}, "must not all be 0"),
    ],
)
def test_bad_actions_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        build(**settings)


def test_masking_after_sem_gives_the_item_away():
    model = build(mask_before_sem=False, random_item_share=0.2)
    items, offsets, timestamps = histories()
    corruption = model.corrupt(items, offsets, timestamps, generator=rng())
    i = int(corruption.hidden.nonzero()[-1])
    other = items.clone()
    other[i] = (other[i] + 1) % V
    again = model.corrupt(other, offsets, timestamps, generator=rng())
    before = model.encode(items, corruption, offsets, timestamps)
    assert not torch.equal(model.encode(other, again, offsets, timestamps), before)


@pytest.mark.parametrize("mask_before_sem", [True, False])
@pytest.mark.parametrize("lengths", [[], [0], [1], [1, 0, 1]])
def test_nothing_to_predict(lengths, mask_before_sem):
    model = build(mask_before_sem=mask_before_sem)
    batch = histories(lengths=lengths) if lengths else histories(lengths=[0])
    out = model(*batch)
    out.loss.backward()
    assert out.num_masked == 0
    assert out.loss.item() == 0.0
    assert all((p.grad == 0).all() for p in model.parameters() if p.grad is not None)


def test_every_parameter_gets_a_gradient():
    model = build(output_bias=True)
    model(*histories(), generator=rng()).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_the_item_table_is_the_items_alone():
    model = MaskedItemModel(num_items=500, embedding_dim=32)
    assert model.item_table.weight.shape == (500, 32)
    assert abs(model.item_table.weight.std() - 0.02) < 0.001


def test_sampled_softmax_above_the_threshold():
    counts = torch.arange(V)
    full, sampled = (
        build(full_softmax_max_items=limit, num_sampled=100_000, item_counts=counts)
        for limit in (V, V - 1)
    )
    assert full.num_sampled is None
    sampled.load_state_dict(full.state_dict())
    want, got = (m(*histories(), generator=rng()).loss for m in (full, sampled))
    assert not torch.equal(got, want)
    torch.testing.assert_close(got, want, rtol=0.02, atol=0.0)
    torch.testing.assert_close(
        sampled.log_proposal.exp(), (counts + 1) / (counts + 1).sum(dtype=torch.float64)
    )


def test_bfloat16_autocast():
    model = build().float()
    want = model(*histories(), generator=rng()).loss
    with torch.autocast("cpu", torch.bfloat16):
        got = model(*histories(), generator=rng()).loss
    got.backward()
    torch.testing.assert_close(got, want, rtol=0.02, atol=0.0)


def test_it_learns_a_planted_pattern():
    """Every user takes the items in order: neighbours determine a masked item."""
    torch.manual_seed(0)
    model = MaskedItemModel(
        num_items=V, embedding_dim=16, sem=SessionEnhancementModule(embedding_dim=16, causal=False)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    offsets, g = torch.arange(0, 321, 10), rng()
    timestamps = torch.arange(10).repeat(32) * 600
    for _ in range(120):
        items = (torch.randint(0, V, (32, 1), generator=g) + torch.arange(10)).flatten() % V
        out = model(items, offsets, timestamps, generator=g)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    assert out.accuracy > 0.25  # by chance 1 / 30


# Arguments ----------------------------------------------------------------------------------


def test_a_history_over_the_limit_is_an_error():
    with pytest.raises(ValueError, match=r"max_sequence_length = 30 .* user row 5 has 40"):
        build(max_sequence_length=30)(*histories())


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("num_items", 1),
        ("mask_ratio", 0.0),
        ("mask_ratio", 1.0),
        ("masking", "token"),
        ("mask_vector_share", 0.95),
        ("random_item_share", -0.1),
        ("max_sequence_length", 0),
        ("num_sampled", 0),
        ("item_counts", torch.ones(3)),
        ("sem", SessionEnhancementModule(embedding_dim=4)),
    ],
)
def test_bad_arguments_are_named(argument, value):
    with pytest.raises(ValueError, match=argument):
        MaskedItemModel(**{"num_items": V, "embedding_dim": D, argument: value})


@pytest.mark.gpu
@pytest.mark.parametrize("limit", [V, V - 1])
def test_cuda_equals_cpu(limit):
    model = build(full_softmax_max_items=limit, num_sampled=64)
    batch = histories(lengths=[7, 0, 40, 1, 23] * 50)

    def run(device):
        module = copy.deepcopy(model).to(device)
        loss = module(*(x.to(device) for x in batch), generator=rng()).loss
        return [loss, *torch.autograd.grad(loss, tuple(module.parameters()))]

    for got, want in zip(run("cuda"), run("cpu"), strict=True):
        torch.testing.assert_close(got.cpu(), want, rtol=1e-8, atol=1e-10)


@pytest.mark.gpu
def test_bfloat16_autocast_on_cuda():
    model = build().float().cuda()
    batch = [x.cuda() for x in histories(lengths=[7, 0, 40, 1, 23] * 50)]
    want = model(*batch, generator=rng()).loss
    with torch.autocast("cuda", torch.bfloat16):
        got = model(*batch, generator=rng()).loss
    got.backward()
    torch.testing.assert_close(got, want, rtol=0.02, atol=0.0)


@pytest.mark.gpu
def test_a_planned_step_waits_for_nothing_on_cuda():
    model = build().float().cuda()
    planner = SequencePlanner(model, torch.device("cuda"))
    items, offsets, timestamps = histories(lengths=[7, 0, 40, 1, 23] * 50)
    sequences = SequenceBatch(items, timestamps, items % 5, offsets, torch.arange(250))
    planned = [planner.plan(sequences, rng(seed)) for seed in range(2)]
    try:
        for batch, mode in zip(planned, ("default", "error"), strict=True):  # the first compiles
            torch.cuda.set_sync_debug_mode(mode)
            batch.to(planner.device).output_of(model).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
