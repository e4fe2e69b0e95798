"""Stage 2 with a sharded table in several processes: resume, evaluation and scoring."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gin
import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from several_processes import in_processes
from small_task import SMALL, config_files, killed_at, without_costs

from hpgr_plugin.cli import load_configs
from hpgr_plugin.config.registry import build
from hpgr_plugin.hosts.embedded.model.ranker import HSTURanker
from hpgr_plugin.hosts.embedded.report.evaluation import Task
from hpgr_plugin.hosts.embedded.report.predictions import PREDICTIONS, load_predictions
from hpgr_plugin.hosts.embedded.train import stages, trainer
from hpgr_plugin.hosts.embedded.train.checkpoint import CheckpointError, load_checkpoint
from hpgr_plugin.hosts.embedded.train.distributed import Process
from hpgr_plugin.hosts.embedded.train.run_directory import CHECKPOINT, checkpoint_folders
from hpgr_plugin.hosts.embedded.train.sharded_checkpoint import ShardedCheckpoints
from hpgr_plugin.hosts.embedded.train.stages import (
    build_ranker,
    evaluate,
    finetune,
    pretrain,
)
from hpgr_plugin.hosts.embedded.train.trainer import TrainingRun
from hpgr_plugin.serving import Scorer

EPOCHS = 2
# Every component, in the form that sends a user's history once.
BINDINGS = [
    "hpgr.HSTURanker.tables = 'rows'",
    "hpgr.MaskedItemModel.tables = 'rows'",
    "hpgr.HSTURanker.sem = @hpgr.SessionEnhancementModule()",
    "hpgr.MaskedItemModel.sem = @hpgr.SessionEnhancementModule()",
    "hpgr.HSTURanker.positional_encoder = @hpgr.TimeAwarePositionalEncoder()",
    "hpgr.HSTURanker.attention_hook = @hpgr.PreferenceGuidedSparseAttention()",
    "hpgr.PreferenceGuidedSparseAttention.top_k = 2",
    "hpgr.PreferenceGuidedSparseAttention.recent = 8",
    "hpgr.PreferenceGuidedSparseAttention.sigma = 1.0",
    "hpgr.PreferenceGuidedSparseAttention.layout = 'auto'",
    "hpgr.PretrainSettings.epochs = 1",
    f"hpgr.FinetuneSettings.epochs = {EPOCHS}",
    "hpgr.FinetuneSettings.patience = 100",
    "hpgr.FinetuneSettings.checkpoint_every = 2",
]


class Waiting(ShardedCheckpoints):
    """The checkpoints of a training that ends without waiting for the last one."""

    made: "list[Waiting]" = []  # noqa: RUF012

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.made.append(self)


def task_and_run(folder: str, *bindings: str, resume: bool = False) -> tuple[Task, TrainingRun]:
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    process = Process(rank, world, torch.device("cpu"))
    gin.clear_config()
    load_configs(config_files(), [*SMALL, *BINDINGS, *bindings])
    task = Task(build("prepare_data"), build("RequestSettings"), process)
    return task, TrainingRun(0, Path(folder), process, resume=resume)


def train(
    folder: str, kill_at: int | None = None, resume: bool = False, bindings: tuple[str, ...] = ()
) -> None:
    """Stage 2 from the hand-over beside its folder; the first process writes the metrics."""
    task, run = task_and_run(folder, *bindings, resume=resume)
    handoff = Path(folder).parent / "stage1" / "handoff.safetensors"
    settings = build("FinetuneSettings")
    if kill_at is not None:
        trainer.ShardedCheckpoints = Waiting
        with killed_at(kill_at):
            finetune(task, settings, run, pretrained=handoff)
        for checkpoints in Waiting.made:
            checkpoints.wait()
        return
    metrics = without_costs(finetune(task, settings, run, pretrained=handoff))
    if run.process.is_main:
        (Path(folder) / "metrics.json").write_text(json.dumps(metrics))


def pretrain_and_train(folder: str) -> None:
    """Both stages, and what the tests rely on: not all processes have as many batches to score."""
    task, run = task_and_run(f"{folder}/stage1")
    assert pretrain(task, build("PretrainSettings"), run).handoff.is_file()
    train(f"{folder}/whole")
    counts = [task.loader(split).num_batches() for split in ("validation", "test")]
    everywhere: list[Any] = [None] * run.process.world_size
    dist.all_gather_object(everywhere, counts)
    assert any(len(set(of_split)) > 1 for of_split in zip(*everywhere, strict=True)), everywhere


def train_dense_and_sharded(folder: str) -> None:
    """From the same weights, which the two would otherwise draw differently."""

    def same_start(task: Task, *, pretrained: Path | None = None) -> HSTURanker:
        model = build_ranker(task, pretrained=pretrained)
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name != "item_table.weight":
                    weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
        return model

    stages.build_ranker = same_start
    for tables in ("dense", "rows"):
        chosen = (f"hpgr.HSTURanker.tables = '{tables}'", "DROPOUT = 0.0")
        train(f"{folder}/{tables}", bindings=chosen)


def check_evaluation(folder: str) -> None:
    """Any number of processes scores the test split as those that trained."""
    task, _ = task_and_run(folder)
    got, wanted = evaluate(task, Path(folder)), metrics_of(Path(folder))
    for name in ("auc", "gauc"):
        assert got[name] == pytest.approx(wanted[name], abs=1e-6), name


def metrics_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both stages in two processes."""
    folder = tmp_path_factory.mktemp("trained")
    in_processes(2, pretrain_and_train, str(folder))
    return folder


def test_one_process_scores_the_same(trained: Path) -> None:
    check_evaluation(str(trained / "whole"))
    (path,) = checkpoint_folders(trained / "whole")
    predictions = load_predictions(trained / "whole" / PREDICTIONS)
    task, _ = task_and_run(str(trained / "whole"))
    rows = task.loader("test").candidate_rows()
    assert len(predictions.score) == len(rows)
    assert np.array_equal(predictions.label, task.data.log.label[np.sort(rows)])
    empty = trained / "nothing"
    with pytest.raises(CheckpointError, match=f"no checkpoint-N of a sharded training in {empty}"):
        evaluate(task, empty)
    gin.clear_config()
    assert path.is_dir()


@pytest.mark.slow
def test_two_and_four_processes_score_the_same(trained: Path) -> None:
    in_processes(2, check_evaluation, str(trained / "whole"))
    in_processes(4, check_evaluation, str(trained / "whole"))


@pytest.mark.slow
def test_finetune_equals_that_of_the_dense_table(trained: Path) -> None:
    """Two processes each, by the real trainer: hand-over, learning rates, clipping, validation."""
    in_processes(2, train_dense_and_sharded, str(trained))
    got, wanted = metrics_of(trained / "rows"), metrics_of(trained / "dense")
    assert len(wanted["history"]) == EPOCHS
    for mine, other in zip([got, *got["history"]], [wanted, *wanted["history"]], strict=True):
        for name in ("auc", "gauc", "log_loss"):
            assert mine[name] == pytest.approx(other[name], abs=1e-5), name
    rows, dense = (load_predictions(trained / name / PREDICTIONS) for name in ("rows", "dense"))
    assert np.abs(rows.score - dense.score).max() < 1e-5
    whole, wanted = (best_weights(trained / name) for name in ("rows", "dense"))
    assert whole.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(whole[name], value, rtol=1e-4, atol=1e-5)


def best_weights(folder: Path) -> dict[str, torch.Tensor]:
    """As the export and the figures read them, in one process."""
    weights: dict[str, torch.Tensor] = load_checkpoint(folder / CHECKPOINT, torch.device("cpu"))[
        "best_model"
    ]
    return weights


@pytest.mark.slow
def test_a_killed_training_continues(trained: Path) -> None:
    """Two processes give the same bits as without a kill; one and four give a whole training."""
    steps = metrics_of(trained / "whole")["steps"]
    for processes in (2, 1, 4):
        folder = trained / f"killed_{processes}"
        in_processes(2, train, str(folder), steps // 2)
        (path,) = checkpoint_folders(folder)
        if processes == 1:
            train(str(folder), resume=True)
            gin.clear_config()
        else:
            in_processes(processes, train, str(folder), None, True)
        got, wanted = metrics_of(folder), metrics_of(trained / "whole")
        if processes == 2:
            assert got == wanted
        assert [path] != checkpoint_folders(folder)
        assert 0.0 < got["auc"] < 1.0
        assert len(got["history"]) == len(wanted["history"]) == EPOCHS


def test_main_trains_evaluates_and_exports(tmp_path: Path) -> None:
    """torchrun with gloo; one process then computes the same metrics, and the model is served."""
    config = tmp_path / "run.gin"
    lines = [f"include '{name}'" for name in config_files()] + SMALL + BINDINGS
    lines += ["hpgr.run.mode = 'finetune'", f"hpgr.run.output_dir = '{tmp_path / 'out'}'"]
    unread = "['MaskedItemModel', 'PretrainSettings', 'SequenceLoader']"
    config.write_text("\n".join([*lines, f"hpgr.run.allow_unused = {unread}"]))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    commands = [
        [*torchrun, "-m", "hpgr_plugin.main"],
        ["-m", "hpgr_plugin.evaluate"],
        ["-m", "hpgr_plugin.serving.export", f"--out={tmp_path / 'served'}"],
    ]
    for command in commands:
        done = subprocess.run(
            [sys.executable, *command, f"--gin_config_file={config}"],
            capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert isinstance(Scorer.load(tmp_path / "served", device="cpu").model, HSTURanker)
    served = load_file(tmp_path / "served" / "model.safetensors")
    for name, value in best_weights(tmp_path / "out").items():
        assert torch.equal(served[f"weight/{name}"], value), name
    trained, single = (
        json.loads((tmp_path / "out" / f"{name}.json").read_text())["metrics"]
        for name in ("results", "evaluation")
    )
    assert single["auc"] == pytest.approx(trained["auc"], abs=1e-6)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["identity"]["world_size"] is None
