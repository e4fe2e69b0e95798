"""What ranks inside a user: losses by gin, statistics and an item bias in the ranker."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hpgr_plugin.config.registry import build
from hpgr_plugin.errors import HpgrError
from hpgr_plugin.hosts.embedded.report.evaluation import Task
from hpgr_plugin.hosts.embedded.train.stages import build_ranker, evaluate, finetune
from hpgr_plugin.hosts.embedded.train.trainer import TrainingRun

Configure = Callable[..., Task]
Training = Callable[..., TrainingRun]


@pytest.mark.parametrize("form", ["linear", "network"])
def test_statistics_reach_the_ranker_and_its_evaluation(
    configure: Configure, training: Training, tmp_path: Path, form: str
) -> None:
    task = configure(
        f"hpgr.HSTURanker.statistics = '{form}'",
        "hpgr.HSTURanker.item_bias = True",
        "hpgr.FinetuneSettings.epochs = 1",
    )
    trained = finetune(task, build("FinetuneSettings"), training())
    assert evaluate(task, tmp_path / "run")["auc"] == trained["auc"]


@pytest.mark.parametrize("form", ["linear", "network"])
def test_statistics_change_the_logits_of_their_candidate_only(
    configure: Configure, form: str
) -> None:
    task = configure(f"hpgr.HSTURanker.statistics = '{form}'")
    task = replace(task, statistics=True)
    model = build_ranker(task).eval()
    batch = next(iter(task.loader("train").batches()))
    if model.item_odds is not None:
        with torch.no_grad():  # it starts at zero
            model.item_odds.linear.weight.fill_(1.0)
    before = model(batch)
    batch.candidate_features["item_likes"][0] = batch.candidate_features["item_count"][0] = 50
    changed = model(batch) != before
    assert changed[0]
    assert not changed[1:].any()


def test_the_item_bias_starts_at_zero_and_is_added(configure: Configure) -> None:
    logits = {}
    for bound in (False, True):
        task = configure(f"hpgr.HSTURanker.item_bias = {bound}")
        torch.manual_seed(0)
        model = build_ranker(task).eval()
        batch = next(iter(task.loader("test").batches()))
        logits[bound] = model(batch)
    torch.testing.assert_close(logits[False], logits[True])
    assert model.item_bias is not None
    with torch.no_grad():
        model.item_bias.weight[batch.candidate_items[0]] = 2.0
    expected = logits[True] + 2.0 * (batch.candidate_items == batch.candidate_items[0])
    torch.testing.assert_close(model(batch), expected)


def test_losses_inside_a_request_change_the_training(
    configure: Configure, training: Training
) -> None:
    found = []
    for binding in ("pairwise_weight = 0.0", "pairwise_weight = 0.5", "listwise_weight = 0.5"):
        task = configure(f"hpgr.FinetuneSettings.{binding}", "hpgr.FinetuneSettings.epochs = 1")
        found.append(finetune(task, build("FinetuneSettings"), training(binding))["log_loss"])
    assert len(set(found)) == 3


def test_a_negative_weight_is_refused(configure: Configure) -> None:
    configure("hpgr.FinetuneSettings.pairwise_weight = -1.0")
    with pytest.raises(HpgrError, match=r"FinetuneSettings\.pairwise_weight takes 0 or more"):
        build("FinetuneSettings")
