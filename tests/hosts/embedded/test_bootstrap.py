"""The paired bootstrap against an obvious version, and predictions on disk."""

import time
from pathlib import Path

import numpy as np
import pytest

from hpgr_plugin import metrics
from hpgr_plugin.errors import HpgrError
from hpgr_plugin.hosts.embedded.report.bootstrap import resampled_metrics
from hpgr_plugin.hosts.embedded.report.comparison import best_rival, differences, summary
from hpgr_plugin.hosts.embedded.report.predictions import (
    Predictions,
    load_predictions,
    save_predictions,
)


def sample(
    seed: int, *, users: int = 30, candidates: int = 300, noise: float = 0.5, groups: bool = False
) -> Predictions:
    """The same candidates for every seed, scored with other noise; some scores are tied."""
    fixed, own = np.random.default_rng(100), np.random.default_rng(seed)
    user = np.sort(fixed.integers(0, users, candidates)).astype(np.int32) * 7
    label = fixed.integers(0, 2, candidates).astype(np.int8)
    group = user * 10 + fixed.integers(0, 3, candidates) if groups else user
    score = np.clip(label * 0.4 + 0.3 + noise * own.normal(size=candidates), 0, 1)
    return Predictions(user, group, label, np.round(score, 2).astype(np.float32))


def obvious(predictions: Predictions, drawn: np.ndarray) -> list[float]:
    """Metrics of the candidates copied as often as their users were drawn."""
    parts = [np.flatnonzero(predictions.user == user) for user in drawn]
    rows = np.concatenate(parts)
    copies = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    label, score = predictions.label[rows], predictions.score[rows].astype(np.float64)
    groups = copies * 10_000 + predictions.group[rows]
    return [metrics.auc(label, score), metrics.gauc(label, score, groups)]


@pytest.mark.parametrize("groups", [False, True], ids=["by-user", "by-impression"])
def test_resampled_metrics_are_those_of_copied_users(groups: bool) -> None:
    sets = [sample(1, groups=groups), sample(2, groups=groups)]
    found = resampled_metrics(sets, resamples=20, seed=5)
    users, random = np.unique(sets[0].user), np.random.default_rng(5)
    draws = [users] + [users[random.integers(len(users), size=len(users))] for _ in range(20)]
    expected = [[obvious(each, drawn) for each in sets] for drawn in draws]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_differences_are_paired_and_average_the_seeds() -> None:
    good = [sample(seed, noise=0.3) for seed in (1, 2)]
    poor = [sample(seed, noise=0.9) for seed in (3, 4)]
    found = differences({"good": good, "poor": poor, "same": poor}, "poor", resamples=200)
    assert set(found) == {"good", "same"}
    assert found["same"]["auc"] == {
        "value": 0, "low": 0, "high": 0, "relative": {"value": 0, "low": 0, "high": 0}
    }  # fmt: skip
    means = [
        np.mean([metrics.auc(each.label, each.score) for each in sets]) for sets in (good, poor)
    ]
    auc = found["good"]["auc"]
    assert auc["value"] == pytest.approx(means[0] - means[1])
    assert auc["relative"]["value"] == pytest.approx(means[0] / means[1] - 1)
    assert 0 < auc["low"] < auc["value"] < auc["high"]
    assert differences({"good": good, "poor": poor}, "poor", resamples=200)["good"] == found["good"]


def test_rows_over_other_candidates_are_left_out() -> None:
    other = sample(1, candidates=200)
    assert differences({"a": [sample(1)], "b": [other]}, "a", resamples=2) == {}
    with pytest.raises(ValueError, match="not of the same candidates"):
        resampled_metrics([sample(1), other])


def test_a_draw_with_one_label_is_left_out() -> None:
    user = np.array([1, 1, 2], dtype=np.int32)
    score = np.array([0.2, 0.9, 0.3], dtype=np.float32)
    one_sided = Predictions(user, user, np.array([0, 1, 0], dtype=np.int8), score)
    found = differences({"a": [one_sided], "b": [one_sided]}, "a", resamples=50)
    assert found["b"]["auc"]["high"] == 0


def test_a_hundred_thousand_candidates_take_seconds() -> None:
    sets = [sample(seed, users=6000, candidates=100_000) for seed in (1, 2)]
    start = time.perf_counter()
    resampled_metrics(sets, resamples=100)
    assert time.perf_counter() - start < 3  # 1000 resamples of one pair: about 2 s


def test_the_best_rival_has_the_highest_mean_auc() -> None:
    rows = [
        {"scope": "a", "rival": True, "seeds": [{"auc": 0.7}, {"auc": 0.9}]},
        {"scope": "b", "rival": True, "seeds": [{"auc": 0.81}, {"auc": 0.82}]},
        {"scope": "c", "rival": False, "seeds": [{"auc": 0.99}]},
    ]
    assert best_rival(rows) == "b"
    assert best_rival(rows[2:]) is None


def test_the_summary_holds_what_is_a_number_in_every_seed() -> None:
    found = summary([{"auc": 0.5, "history": []}, {"auc": 0.7, "history": [], "x": 1.0}])
    assert set(found) == {"auc"}
    assert found["auc"]["mean"] == pytest.approx(0.6)
    assert found["auc"]["standard_deviation"] == pytest.approx(0.02**0.5)
    assert summary([]) == {}


@pytest.mark.parametrize("groups", [False, True])
def test_predictions_survive_the_disk(tmp_path: Path, groups: bool) -> None:
    path, predictions = tmp_path / "run" / "predictions.npz", sample(1, groups=groups)
    save_predictions(path, predictions)
    for name, array in load_predictions(path)._asdict().items():
        np.testing.assert_array_equal(array, getattr(predictions, name))
    with pytest.raises(HpgrError, match="no predictions at"):
        load_predictions(tmp_path / "absent.npz")
    for content in (b"", path.read_bytes()[:100], b"PK\x03\x04"):
        path.write_bytes(content)
        with pytest.raises(HpgrError, match="damaged"):
            load_predictions(path)
