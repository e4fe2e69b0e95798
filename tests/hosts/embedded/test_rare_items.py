"""Unseen and rare items: the [UNK] row, how often it stands in, and the gate of the features."""

import pytest
import torch
from test_ranker import BATCH, NUM_ITEMS, make_batch, make_model

from hpgr_plugin.errors import HpgrError
from hpgr_plugin.hosts.embedded.model.rare_items import RareItems
from hpgr_plugin.hosts.embedded.model.token_features import FeatureSizes

COUNTS = torch.tensor([0, 1, 9, 10**6])
SIZES = FeatureSizes(
    embedding_dim=8,
    num_actions=2,
    item_feature_codes={"genre": torch.zeros(4)},
    item_counts=COUNTS,
)


def test_an_item_without_events_is_unknown() -> None:
    rare, rows = RareItems(sizes=SIZES).eval(), torch.randn(4, 8)
    got = rare(rows, torch.arange(4), None)
    assert torch.equal(got[0], rare.unknown_table.weight[0])
    assert torch.equal(got[1:], rows[1:])


@pytest.mark.parametrize("tau", [0.0, 1.0, 3.0])
def test_training_replaces_rare_items_at_their_rate(tau: float) -> None:
    torch.manual_seed(0)
    rare, draws = RareItems(sizes=SIZES, tau=tau), 20_000
    for item, count in enumerate(COUNTS.tolist()):
        items = torch.full((draws,), item)
        got = rare(torch.ones(draws, 8), items, None)
        replaced = (got != 1).any(1).float().mean().item()
        want = 1.0 if count == 0 else tau / (tau + count)
        assert replaced == pytest.approx(want, abs=0.02)


def test_the_gate_moves_from_the_features_to_the_row() -> None:
    rare = RareItems(sizes=SIZES, gate_tau=9.0).eval()
    rows, features = torch.ones(4, 8), torch.zeros(4, 8)
    got = rare(rows, torch.arange(4), features)[:, 0]
    torch.testing.assert_close(got, torch.tensor([0.0, 0.1, 0.5, 10**6 / (10**6 + 9)]))


def test_gated_features_are_not_added_again() -> None:
    features = {"genre": torch.arange(NUM_ITEMS) % 4}
    model = make_model(
        item_feature_codes=features,
        item_counts=torch.full((NUM_ITEMS,), 10**12),
        rare_items=RareItems,
    )
    model.rare_items.gate_tau = 1.0  # of so many events the row is all that counts
    plain = make_model()
    plain.load_state_dict(model.state_dict(), strict=False)
    batch = make_batch(**BATCH)
    torch.testing.assert_close(model(batch), plain(batch), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("sizes", "settings", "message"),
    [
        (SIZES, {"tau": -1.0}, "tau must be at least 0"),
        (FeatureSizes(embedding_dim=8, num_actions=2), {}, "RareItems needs item_counts"),
        (
            FeatureSizes(embedding_dim=8, num_actions=2, item_counts=COUNTS),
            {"gate_tau": 1.0},
            "gate_tau must be 0 for a log without item features",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(
    sizes: FeatureSizes, settings: dict[str, float], message: str
) -> None:
    with pytest.raises(HpgrError, match=message):
        RareItems(sizes=sizes, **settings)
