"""The two stages end to end on the synthetic log: determinism, resuming, hand-over, learning."""

import json
from collections.abc import Callable
from pathlib import Path

import gin
import pytest
import torch
from small_task import killed_at, without_costs
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hpgr_plugin.config.registry import ConfigError, build
from hpgr_plugin.hosts.embedded.model.ranker import HSTURanker
from hpgr_plugin.hosts.embedded.report.ablation import run_ablation
from hpgr_plugin.hosts.embedded.report.evaluation import Task
from hpgr_plugin.hosts.embedded.report.predictions import load_predictions
from hpgr_plugin.hosts.embedded.train.checkpoint import CheckpointError, load_checkpoint
from hpgr_plugin.hosts.embedded.train.stages import (
    build_ranker,
    evaluate,
    finetune,
    item_mean,
    pretrain,
)
from hpgr_plugin.hosts.embedded.train.trainer import Trainer, TrainingRun
from hpgr_plugin.metrics import ranking_metrics
from hpgr_plugin.transfer.handoff import HandoffError

Configure = Callable[..., Task]
Training = Callable[..., TrainingRun]


def test_a_seed_fixes_both_stages(configure: Configure, training: Training) -> None:
    runs = []
    for attempt in ("first", "second"):
        task = configure()
        stage1 = pretrain(task, build("PretrainSettings"), training(f"{attempt}/1", seed=3))
        with gin.config_scope("pgsa_recent"):
            metrics = finetune(
                task,
                build("FinetuneSettings"),
                training(f"{attempt}/2", seed=3),
                pretrained=stage1.handoff,
            )
        runs.append((without_costs(stage1.metrics), without_costs(metrics)))
    assert runs[0] == runs[1]
    other = pretrain(task, build("PretrainSettings"), training("other", seed=4))
    assert other.metrics["loss"] != runs[0][0]["loss"]


@pytest.mark.parametrize("row", ["hstu", "stochastic", "sem"])
def test_resuming_gives_the_same_numbers(
    configure: Configure,
    training: Training,
    tmp_path: Path,
    row: str,
) -> None:
    def train(folder: str, resume: bool = False) -> dict:
        task = configure(
            "hpgr.FinetuneSettings.checkpoint_every = 4",
            "stochastic/hpgr.HSTURanker.attention_hook = @hpgr.StochasticLength()",
            "hpgr.StochasticLength.alpha = 1.2",
        )
        with gin.config_scope(row):
            run = training(folder, resume=resume)
            return without_costs(finetune(task, build("FinetuneSettings"), run))

    whole = train("whole")
    with killed_at(10):
        train("killed")
    assert train("killed", resume=True) == whole
    weights = [
        load_checkpoint(tmp_path / name / "checkpoint.pt", torch.device("cpu"))["model"]
        for name in ("whole", "killed")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_resuming_stage_1_inside_an_epoch_gives_the_same_numbers(
    configure: Configure, training: Training, tmp_path: Path
) -> None:
    """Masks belong to a step, wherever the batches before it were planned."""

    def train(folder: str, resume: bool = False) -> dict:
        task = configure("hpgr.PretrainSettings.checkpoint_every = 3")
        with gin.config_scope("mim_sem"):
            run = training(folder, resume=resume)
            return without_costs(pretrain(task, build("PretrainSettings"), run).metrics)

    whole = train("whole")
    with killed_at(4):
        train("killed")
    assert train("killed", resume=True) == whole
    shown = EventAccumulator(str(tmp_path / "whole" / "tb"))
    shown.Reload()
    steps = [event.step for event in shown.Scalars("train/loss")]
    assert steps == list(range(10, int(whole["steps"]) + 1, 10)) != []


def test_stage_1_with_actions_is_handed_over(configure: Configure, training: Training) -> None:
    losses = {}
    for name, bindings in {
        "plain": [],
        "on_action": ["hpgr.MaskedItemModel.condition_on_action = True"],
        "weighted": ["hpgr.MaskedItemModel.action_weights = [0.5, 2.0]"],
        "positive": ["hpgr.SequenceLoader.only_positive = True"],
    }.items():
        task = configure("hpgr.prepare_data.history_events = 'all'", *bindings)
        assert task.data.log.num_actions == 2
        stage1 = pretrain(task, build("PretrainSettings"), training(name))
        losses[name] = stage1.metrics["loss"]
        assert build_ranker(task, pretrained=stage1.handoff).inherited == ("item_table",)
    assert len(set(losses.values())) == 4


def test_stage_2_inherits_the_item_features_of_stage_1(
    configure: Configure, training: Training
) -> None:
    task = configure(
        "hpgr.SyntheticReader.features = True",
        "hpgr.MaskedItemModel.feature_gate_tau = 5.0",
        "hpgr.RareItems.gate_tau = 5.0",
        "hpgr.HSTURanker.rare_items = @hpgr.RareItems",
    )
    stage1 = pretrain(task, build("PretrainSettings"), training())
    ranker = build_ranker(task, pretrained=stage1.handoff)
    assert ranker.inherited == ("item_table", "item_features")
    fresh = build_ranker(task)
    for name, value in ranker.item_features.state_dict().items():
        assert not torch.equal(value, fresh.item_features.state_dict()[name])


def test_a_pre_trained_sem_is_frozen_for_its_first_epochs(
    configure: Configure, training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = configure(
        "hpgr.SessionEnhancementModule.gate_init = 0.1",
        "hpgr.FinetuneSettings.frozen_sem_epochs = 1",
    )
    seen: list[tuple[int, list[torch.Tensor]]] = []
    step = Trainer._step

    def watched(self: Trainer, *args: object) -> torch.Tensor:
        loss = step(self, *args)
        if self.run.stage == "finetune":
            weights = [p.detach().clone() for p in self.model.sem.parameters()]
            seen.append((self.progress.epoch, weights))
        return loss

    with gin.config_scope("mim_sem"):
        stage1 = pretrain(task, build("PretrainSettings"), training("1"))
    with gin.config_scope("sem"):
        start = [p.detach() for p in build_ranker(task, pretrained=stage1.handoff).sem.parameters()]
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "_step", watched)
            finetune(task, build("FinetuneSettings"), training("2"), pretrained=stage1.handoff)
    assert {epoch for epoch, _ in seen} == {0, 1, 2}
    for epoch, weights in seen:
        same = [torch.equal(a, b) for a, b in zip(start, weights, strict=True)]
        assert all(same) if epoch == 0 else not any(same)


@pytest.mark.parametrize("step", [3, 9], ids=["frozen", "trained"])
def test_resuming_with_a_frozen_sem_gives_the_same_numbers(
    configure: Configure, training: Training, step: int
) -> None:
    """Killed in the epoch in which SEM is frozen, and in the one after."""
    task = configure(
        "hpgr.SessionEnhancementModule.gate_init = 0.1",
        "hpgr.FinetuneSettings.frozen_sem_epochs = 1",
        "hpgr.FinetuneSettings.checkpoint_every = 2",
    )
    with gin.config_scope("mim_sem"):
        stage1 = pretrain(task, build("PretrainSettings"), training("1"))

    def train(folder: str, resume: bool = False) -> dict:
        with gin.config_scope("sem"):
            settings, run = build("FinetuneSettings"), training(folder, resume=resume)
            return without_costs(finetune(task, settings, run, pretrained=stage1.handoff))

    whole = train("whole")
    first, second, _ = (row["step"] for row in whole["history"])
    assert 3 < first < 9 < second
    with killed_at(step):
        train("killed")
    assert train("killed", resume=True) == whole


@pytest.mark.parametrize("row", ["hstu", "sem"])
def test_without_a_pre_trained_sem_none_can_be_frozen(
    configure: Configure, training: Training, row: str
) -> None:
    task = configure("hpgr.FinetuneSettings.frozen_sem_epochs = 1")
    words = (
        r"^hpgr\.FinetuneSettings\.frozen_sem_epochs = 1 takes a pre-trained hpgr\.HSTURanker\.sem"
    )
    with gin.config_scope(row), pytest.raises(ConfigError, match=words):
        finetune(task, build("FinetuneSettings"), training())


def test_stage_2_starts_from_stage_1(configure: Configure, training: Training) -> None:
    task = configure()
    with gin.config_scope("mim_sem"):
        stage1 = pretrain(task, build("PretrainSettings"), training())
    with gin.config_scope("full"):
        fresh = build_ranker(task)
        ranker = build_ranker(task, pretrained=stage1.handoff)
    assert fresh.inherited == ()
    assert ranker.inherited == ("item_table", "sem")
    assert not torch.equal(fresh.item_table.weight, ranker.item_table.weight)
    with pytest.raises(HandoffError, match="vocabulary_digest"):
        HSTURanker(
            num_items=task.data.log.num_items,
            num_actions=task.data.log.num_actions,
            vocabulary_digest="another",
            embedding_dim=16,
            pretrained=str(stage1.handoff),
        )


@pytest.mark.parametrize("row", ["hstu", "mtgr"])
def test_it_learns_what_was_planted(configure: Configure, training: Training, row: str) -> None:
    """Only the user's old events tell a label: the item mean is no better than a coin."""
    task = configure(
        "NUM_USERS = 400",
        "DISTRACTORS = 5",
        "hpgr.SyntheticReader.num_clusters = 8",
        "hpgr.SyntheticReader.liked_clusters = 2",
        "hpgr.SyntheticReader.items_per_cluster = 2",
        "hpgr.RequestLoader.batch_tokens = 1024",
        "hpgr.FinetuneSettings.epochs = 5",
        "hpgr.FinetuneSettings.learning_rate = 5e-3",
    )
    with gin.config_scope(row):
        metrics = finetune(task, build("FinetuneSettings"), training())
    assert item_mean(task)["auc"] < 0.6
    assert metrics["auc"] > 0.95


def test_evaluate_reads_the_best_weights(
    configure: Configure, training: Training, tmp_path: Path
) -> None:
    task = configure()
    trained = finetune(task, build("FinetuneSettings"), training())
    again = evaluate(task, tmp_path / "run")
    assert again["auc"] == trained["auc"]
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        evaluate(task, tmp_path / "elsewhere")


def test_sem_that_would_show_the_future_is_refused(configure: Configure) -> None:
    task = configure("hpgr.SessionEnhancementModule.causal = False")
    with gin.config_scope("sem"), pytest.raises(ValueError, match="causal must be True"):
        build_ranker(task)


def test_the_session_gap_reaches_the_metrics(configure: Configure) -> None:
    """Sessions of the synthetic log are 7140 s apart: with a longer gap there is only one."""
    task = configure("SESSION_GAP_SECONDS = 9000")
    assert "auc_many_sessions" in item_mean(task)
    gap = gin.query_parameter("SESSION_GAP_SECONDS/gin.macro.value")
    coarse = Task(task.data, task.requests, task.process, session_gap_seconds=gap)
    assert "auc_many_sessions" not in item_mean(coarse)
    for name in ("run", "prepare_data"):
        bound = gin.query_parameter(f"hpgr.{name}.session_gap_seconds")
        assert bound.scoped_configurable_fn() == gap


def test_an_ablation_writes_table_plot_and_warnings(
    configure: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = configure("hpgr.FinetuneSettings.epochs = 1", "hpgr.PretrainSettings.epochs = 1")
    results = run_ablation(task, ["hstu", "base", "full"], seeds=[0, 1], output_dir=tmp_path)
    table = (tmp_path / "table.md").read_text()
    assert [row["scope"] for row in results["rows"]] == ["item_mean", "hstu", "base", "full"]
    assert all(len(row["seeds"]) == 2 for row in results["rows"][1:])
    assert {scope: len(runs) for scope, runs in results["stage1"].items()} == {
        "mim": 2,
        "mim_sem": 2,
    }
    assert "HPGR base" in table
    assert "±" in table
    printed = capsys.readouterr().out
    baseline = results["rows"][0]["seeds"][0]["auc"]
    for row in results["rows"][1:]:
        beaten = sum(seed["auc"] for seed in row["seeds"]) / 2 > baseline
        assert (f"WARNING: {row['title']} did NOT beat" in printed) == (not beaten)
    assert (tmp_path / "ablation.png").stat().st_size > 0
    assert list((tmp_path / "full_seed1" / "tb").iterdir())
    assert results["best_rival"] == "hstu"
    assert "from the best rival, HSTU" in table
    for row in results["rows"]:
        aucs = [seed["auc"] for seed in row["seeds"]]
        assert row["summary"]["auc"]["mean"] == pytest.approx(sum(aucs) / len(aucs))
        if row["scope"] == "hstu":
            assert "difference" not in row
            continue
        rival = results["rows"][1]["summary"]["auc"]["mean"]
        found = row["difference"]["auc"]
        assert found["value"] == pytest.approx(row["summary"]["auc"]["mean"] - rival, abs=1e-6)
        assert found["low"] <= found["value"] <= found["high"]
        assert f"[{found['low']:+.4f}, {found['high']:+.4f}]" in table
    stored = load_predictions(tmp_path / "full_seed1" / "predictions.npz")
    again = ranking_metrics(stored.label, stored.score, stored.user)
    assert again["auc"] == pytest.approx(results["rows"][3]["seeds"][1]["auc"], abs=1e-6)
    assert not list(tmp_path.rglob("*.tmp"))
    json.dumps(results)


def test_tuned_rows_take_the_learning_rate_of_the_best_validation(
    configure: Callable[..., Task], tmp_path: Path
) -> None:
    task = configure("hpgr.FinetuneSettings.epochs = 1")
    rates = (1e-5, 3e-3)
    results = run_ablation(task, ["hstu"], seeds=[0, 1], output_dir=tmp_path, learning_rates=rates)
    line = results["rows"][1]
    assert line["learning_rate"] == max(rates, key=lambda rate: line["tries"][f"{rate:g}"])
    folders = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    best = f"hstu_lr{line['learning_rate']:g}"
    assert folders == {
        "item_mean",
        *(f"hstu_lr{rate:g}_seed0" for rate in rates),
        f"{best}_seed1",
    }
    assert line["folders"] == [f"{best}_seed0", f"{best}_seed1"]
    assert "best validation AUC: HSTU" in (tmp_path / "table.md").read_text()


def test_several_workers_train_what_one_trains(
    configure: Callable[..., Task], tmp_path: Path
) -> None:
    rows, seeds = ["hstu", "base"], [0, 1]
    tables = []
    for workers in (1, 2):
        torch.set_num_threads(1)
        task = configure("hpgr.FinetuneSettings.epochs = 1", "hpgr.PretrainSettings.epochs = 1")
        folder = tmp_path / str(workers)
        results = run_ablation(task, rows, seeds=seeds, output_dir=folder, workers=workers)
        tables.append([[run["auc"] for run in line["seeds"]] for line in results["rows"]])
    assert tables[0] == tables[1]
