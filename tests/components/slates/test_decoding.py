"""Cached beam decoding against full recomputation, and what no slate may ever hold."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_slates import KINDS, catalogue, decoder_of, user, users

from hpgr_plugin.components.slates import naive
from hpgr_plugin.components.slates.beam import Allowed
from hpgr_plugin.components.slates.decoder import DecoderSizes, HierarchicalDecoder
from hpgr_plugin.components.slates.semantic_ids import SemanticIds
from hpgr_plugin.errors import HpgrError

EXCLUDED = [{3, 4, 5}, set(), {0, 49}]
CATALOGUES = {
    "collisions": catalogue(),
    "no-collisions": SemanticIds(
        torch.cartesian_prod(*[torch.arange(4)] * 3)[:50], codebook_size=4
    ),
    "one-level": SemanticIds(torch.arange(50).unsqueeze(1), codebook_size=64),
}


def allowed_by(ids: SemanticIds, excluded: list[set[int]], least: int = 4) -> Allowed:
    mask = torch.zeros(len(excluded), ids.num_items, dtype=torch.bool)
    for row, items in enumerate(excluded):
        mask[row, list(items)] = True
    return Allowed.all_but(ids, mask, least=least)


@torch.no_grad()
@pytest.mark.parametrize("ids", CATALOGUES.values(), ids=CATALOGUES.keys())
@pytest.mark.parametrize("width", [1, 3, 50], ids=["greedy", "beam", "exhaustive"])
@pytest.mark.parametrize("kind", [name for name in KINDS if name != "flat-slate"])
def test_slates_are_those_of_full_recomputation(kind: str, width: int, ids: SemanticIds) -> None:
    model, context = decoder_of(kind, ids), users()
    slates = model.generate(context, allowed_by(ids, EXCLUDED), width=width)
    for row, banned in enumerate(EXCLUDED):
        exhaustive = None if width == ids.num_items else width
        items, scores = naive.generate(model, user(context, row), banned=banned, width=exhaustive)
        assert slates.items[row].tolist() == items
        torch.testing.assert_close(slates.log_probs[row], torch.tensor(scores), rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("width", [1, 3], ids=["greedy", "beam"])
def test_flat_slates_are_those_of_full_recomputation(width: int) -> None:
    ids = CATALOGUES["collisions"]
    model, context = decoder_of("flat-slate", ids, slate_size=3), users()
    slates = model.generate(context, allowed_by(ids, EXCLUDED), width=width)
    for row, banned in enumerate(EXCLUDED):
        items, score = naive.generate_flat(model, user(context, row), banned=banned, width=width)
        assert slates.items[row].tolist() == items
        assert float(slates.log_probs[row].sum()) == pytest.approx(score, abs=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_log_probs_of_generated_slates_are_those_of_training(kind: str) -> None:
    ids, context = CATALOGUES["collisions"], users()
    model = decoder_of(kind, ids)
    slates = model.generate(context, allowed_by(ids, EXCLUDED), width=3)
    forced = model.log_probs(context, slates.items).sum(2)
    torch.testing.assert_close(slates.log_probs, forced, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_probabilities_of_all_items_sum_to_one(kind: str) -> None:
    ids, context = CATALOGUES["collisions"], user(users(), 0)
    model = decoder_of(kind, ids)
    slates = torch.zeros(50, 4, dtype=torch.long)
    slates[:, 0], slates[:, 1] = 7, torch.arange(50)
    every = context._replace(
        tokens=context.tokens.expand(50, -1, -1), real=context.real.expand(50, -1)
    )
    found = model.log_probs(every, slates)[:, 1]
    total = found[:, : ids.num_levels].sum(1).exp().sum()
    assert float(total) == pytest.approx(1.0, abs=1e-5)


@torch.no_grad()
@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    items=st.integers(4, 60),
    codebook_size=st.integers(1, 6),
    levels=st.integers(1, 3),
    width=st.integers(1, 6),
    banned=st.integers(0, 60),
    seed=st.integers(0, 1000),
)
def test_no_slate_holds_an_invalid_or_repeated_item(
    kind: str, items: int, codebook_size: int, levels: int, width: int, banned: int, seed: int
) -> None:
    rng = torch.Generator().manual_seed(seed)
    digits = torch.randint(0, codebook_size, (items, levels), generator=rng)
    ids = SemanticIds(digits, codebook_size=codebook_size, index_size=64)
    model, context = decoder_of(kind, ids), users(seed)
    mask = torch.rand(3, items, generator=rng).argsort(1) < banned
    slates = model.generate(context, Allowed.all_but(ids, mask, least=4), width=width)
    assert slates.items.shape == (3, 4)
    assert torch.isfinite(slates.log_probs).all()
    for row, excluded in zip(slates.items.tolist(), mask, strict=True):
        assert len(set(row)) == 4
        assert all(0 <= item < items for item in row)
        if int((~excluded).sum()) >= 4:
            assert not excluded[row].any()


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_slate_does_not_depend_on_the_other_users_of_the_batch(kind: str) -> None:
    ids, context = CATALOGUES["collisions"], users()
    model = decoder_of(kind, ids)
    together = model.generate(context, Allowed.all_but(ids, None, least=4), width=3)
    for row in range(3):
        alone = model.generate(user(context, row), Allowed.all_but(ids, None, least=4), width=3)
        assert torch.equal(alone.items[0], together.items[row])


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_that_is_used_receives_a_gradient(kind: str) -> None:
    ids = CATALOGUES["collisions"]
    model = decoder_of(kind, ids).train()
    slates = torch.randint(0, 50, (3, 4))
    model.log_probs(users(), slates).sum().backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    unread = {
        "no-planner": {"bos", "digit_tables.3.weight"},
        "flat-item": {"digit_tables.3.weight"},
    }
    assert without == unread.get(kind, set())


def test_a_later_item_changes_nothing_for_an_earlier_one() -> None:
    ids = CATALOGUES["collisions"]
    slates = torch.randint(0, 50, (3, 4))
    other = slates.clone()
    other[:, 2] = (other[:, 2] + 1) % 50
    for kind in KINDS:
        model = decoder_of(kind, ids)
        before, after = model.log_probs(users(), slates), model.log_probs(users(), other)
        torch.testing.assert_close(before[:, :2], after[:, :2], rtol=0, atol=1e-6)
        assert not torch.equal(before[:, 2], after[:, 2])


@torch.no_grad()
def test_the_item_that_its_row_favours_wins_whatever_its_digits_say() -> None:
    ids = CATALOGUES["collisions"]
    model, context = decoder_of("items", ids), users()
    slates = torch.randint(0, 50, (3, 4))
    assert model.log_probs(context, slates).shape == (3, 4, ids.num_levels + 1)
    assert model.counted(slates)[..., -1].all()
    assert isinstance(model.item_query, torch.nn.Linear)
    model.item_query.weight.zero_()
    model.item_query.bias.fill_(100.0)
    rows = torch.zeros(200, 16)
    rows[17] = 1.0
    allowed = Allowed.all_but(ids, None, least=4)
    found = model.generate(context._replace(items=rows), allowed, width=64)
    assert (found.items[:, 0] == 17).all()


def test_item_scores_need_a_planner() -> None:
    ids = CATALOGUES["collisions"]
    sizes = DecoderSizes(embedding_dim=16, num_heads=2, dropout=0.0, slate_size=4)
    with pytest.raises(HpgrError, match="item_scores"):
        HierarchicalDecoder(ids=ids, sizes=sizes, planner_layers=0, item_scores=True)


def test_a_catalogue_smaller_than_the_slate_is_refused() -> None:
    with pytest.raises(HpgrError, match="a slate of 4 needs as many items, got 3"):
        decoder_of("hierarchical", catalogue(3))


def test_the_memory_is_that_of_normed_keys_and_values() -> None:
    """The norms' weights are taken into the projections: the same as norm, then projection."""
    model, context = decoder_of("flat-item", CATALOGUES["collisions"]), users()
    for block, memory in zip(model.stack.blocks, model.stack.memory(context), strict=True):
        keys = block.cross_key(block.key_norm(context.tokens))
        values = block.cross_value(block.value_norm(context.tokens))
        assert memory is not None
        for found, wanted in ((memory.keys, keys), (memory.values, values)):
            torch.testing.assert_close(found.transpose(1, 2).flatten(2), wanted)


def test_digits_begin_with_the_rows_of_their_items() -> None:
    ids = SemanticIds(torch.tensor([[0, 0], [0, 1], [1, 0], [1, 0]]), codebook_size=3)
    model, rows = decoder_of("hierarchical", ids), torch.randn(4, 16)
    unused = model.digit_tables[0].weight[2].clone()
    model.start_from(rows)
    table = model.digit_tables[0].weight
    torch.testing.assert_close(table[:2], torch.stack([rows[:2].mean(0), rows[2:].mean(0)]))
    assert torch.equal(table[2], unused)
    found = model.item_vectors(torch.arange(4)) / 16**0.5
    error = (found - rows).square().mean() / rows.square().mean()
    assert error < 0.6  # levels past the first hold what few digits can hold
