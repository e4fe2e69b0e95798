"""The two stages end to end on the synthetic log: determinism, resuming, hand-over, learning."""

import json
from collections.abc import Callable
from pathlib import Path

import gin
import pytest
import torch

from hpgr_plugin.data.prepare import prepare_data
from hpgr_plugin.hosts.embedded.model.ranker import HSTURanker
from hpgr_plugin.hosts.embedded.report.ablation import run_ablation
from hpgr_plugin.hosts.embedded.train.checkpoint import load_checkpoint
from hpgr_plugin.hosts.embedded.train.distributed import Process
from hpgr_plugin.hosts.embedded.train.stages import (
    build_ranker,
    evaluate,
    finetune,
    item_mean,
    pretrain,
)
from hpgr_plugin.hosts.embedded.train.trainer import Trainer
from hpgr_plugin.transfer.handoff import HandoffError

Configure = Callable[..., None]
COSTS = ("seconds_per_step", "examples_per_second")


def without_costs(figures: dict) -> dict:
    return {key: value for key, value in figures.items() if key not in COSTS}


def test_a_seed_fixes_both_stages(configure: Configure, alone: Process, tmp_path: Path) -> None:
    runs = []
    for attempt in ("first", "second"):
        configure()
        data = prepare_data()
        stage1 = pretrain(data, seed=3, output_dir=tmp_path / attempt / "1", process=alone)
        with gin.config_scope("pgsa_recent"):
            figures = finetune(
                data,
                seed=3,
                output_dir=tmp_path / attempt / "2",
                process=alone,
                pretrained=str(stage1.handoff),
            )
        runs.append((without_costs(stage1.figures), without_costs(figures)))
    assert runs[0] == runs[1]
    configure()
    other = pretrain(data, seed=4, output_dir=tmp_path / "other", process=alone)
    assert other.figures["loss"] != runs[0][0]["loss"]


@pytest.mark.parametrize("row", ["hstu", "stochastic", "sem"])
def test_resuming_gives_the_same_numbers(
    configure: Configure,
    alone: Process,
    tmp_path: Path,
    row: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def train(output_dir: Path, resume: bool = False) -> dict:
        configure(
            "hpgr.FinetuneSettings.checkpoint_every = 4",
            "stochastic/hpgr.HSTURanker.attention_hook = @hpgr.StochasticLength()",
            "hpgr.StochasticLength.alpha = 1.2",
        )
        with gin.config_scope(row):
            return without_costs(
                finetune(
                    prepare_data(), seed=0, output_dir=output_dir, process=alone, resume=resume
                )
            )

    whole = train(tmp_path / "whole")
    step = Trainer._step

    def killed_at_step_10(self: Trainer, *args: object) -> torch.Tensor:
        if self.progress.step == 10:
            raise KeyboardInterrupt
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", killed_at_step_10)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "killed")
    assert train(tmp_path / "killed", resume=True) == whole
    weights = [
        load_checkpoint(tmp_path / name / "checkpoint.pt", torch.device("cpu"))["model"]
        for name in ("whole", "killed")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_stage_2_starts_from_stage_1(configure: Configure, alone: Process, tmp_path: Path) -> None:
    configure()
    data = prepare_data()
    with gin.config_scope("mim_sem"):
        stage1 = pretrain(data, seed=0, output_dir=tmp_path, process=alone)
    with gin.config_scope("full"):
        fresh = build_ranker(data)
        ranker = build_ranker(data, pretrained=str(stage1.handoff))
    assert fresh.inherited == ()
    assert ranker.inherited == ("item_table", "sem")
    assert not torch.equal(fresh.item_table.weight, ranker.item_table.weight)
    with pytest.raises(HandoffError, match="vocabulary_digest"):
        HSTURanker(
            num_items=data.log.num_items,
            num_actions=data.log.num_actions,
            vocabulary_digest="another",
            embedding_dim=16,
            pretrained=str(stage1.handoff),
        )


@pytest.mark.parametrize("row", ["hstu", "mtgr"])
def test_it_learns_what_was_planted(
    configure: Configure, alone: Process, tmp_path: Path, row: str
) -> None:
    """A label is known from the user's old events alone: the item mean is a coin."""
    configure(
        "NUM_USERS = 400",
        "DISTRACTORS = 5",
        "hpgr.SyntheticReader.num_clusters = 8",
        "hpgr.SyntheticReader.liked_clusters = 2",
        "hpgr.SyntheticReader.items_per_cluster = 2",
        "hpgr.RequestLoader.batch_tokens = 1024",
        "hpgr.FinetuneSettings.epochs = 5",
        "hpgr.FinetuneSettings.learning_rate = 5e-3",
    )
    data = prepare_data()
    with gin.config_scope(row):
        figures = finetune(data, seed=0, output_dir=tmp_path, process=alone)
    assert item_mean(data)["auc"] < 0.6
    assert figures["auc"] > 0.95


def test_evaluate_reads_the_best_weights(
    configure: Configure, alone: Process, tmp_path: Path
) -> None:
    configure()
    data = prepare_data()
    trained = finetune(data, seed=0, output_dir=tmp_path, process=alone)
    again = evaluate(data, output_dir=tmp_path, process=alone)
    assert again["auc"] == trained["auc"]


def test_sem_that_would_show_the_future_is_refused(configure: Configure) -> None:
    configure("hpgr.SessionEnhancementModule.causal = False")
    with gin.config_scope("sem"), pytest.raises(ValueError, match="causal must be True"):
        build_ranker(prepare_data())


def test_an_ablation_writes_table_plot_and_warnings(
    configure: Configure, alone: Process, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configure("hpgr.FinetuneSettings.epochs = 1", "hpgr.PretrainSettings.epochs = 1")
    figures = run_ablation(
        prepare_data(),
        rows=["base", "pgsa", "full"],
        seeds=[0, 1],
        output_dir=tmp_path,
        process=alone,
    )
    table = (tmp_path / "table.md").read_text()
    assert [row["scope"] for row in figures["rows"]] == ["item_mean", "base", "pgsa", "full"]
    assert all(len(row["seeds"]) == 2 for row in figures["rows"][1:])
    assert {scope: len(runs) for scope, runs in figures["stage1"].items()} == {
        "mim": 2,
        "mim_sem": 2,
    }
    assert "HPGR base" in table
    assert "±" in table
    printed = capsys.readouterr().out
    floor = figures["rows"][0]["seeds"][0]["auc"]
    for row in figures["rows"][1:]:
        beaten = sum(seed["auc"] for seed in row["seeds"]) / 2 > floor
        assert (f"WARNING: {row['title']} did NOT beat" in printed) == (not beaten)
    assert (tmp_path / "ablation.png").stat().st_size > 0
    assert list((tmp_path / "full_seed1" / "tb").iterdir())
    json.dumps(figures)
