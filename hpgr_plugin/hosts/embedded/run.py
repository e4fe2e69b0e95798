"""`hpgr.run`: what the entry points do with the configured data, model and stages."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hpgr_plugin.config.bindings import check_unused
from hpgr_plugin.config.registry import ConfigError, build
from hpgr_plugin.config.scopes import check_scopes
from hpgr_plugin.hosts.embedded.report.ablation import run_ablation
from hpgr_plugin.hosts.embedded.report.evaluation import Task
from hpgr_plugin.hosts.embedded.report.results import write_results
from hpgr_plugin.hosts.embedded.train.distributed import process_group
from hpgr_plugin.hosts.embedded.train.stages import evaluate, finetune, pretrain
from hpgr_plugin.hosts.embedded.train.trainer import TrainingRun

LOG = logging.getLogger(__name__)
MODES = ("pretrain", "finetune", "evaluate", "ablation")


def run(
    *,
    mode: str,
    output_dir: str,
    seeds: Sequence[int] = (0,),
    rows: Sequence[str] = (),
    resume: bool = False,
    session_gap_seconds: int = 1800,
    allow_unused: bool = False,
) -> None:
    """Run `mode` and write `output_dir/results.json`.

    An evaluation writes `evaluation.json` instead, so that the results of the training stay.

    Args:
        mode: "pretrain", "finetune", "evaluate" or "ablation".
        output_dir: folder of everything that the run writes.
        seeds: of an ablation, one training of each row per seed; other modes take the first one.
        rows: gin scopes of an ablation, one per row of its table.
        resume: continue from the last checkpoints in `output_dir`.
        session_gap_seconds: longest pause inside a session, for the AUC of users with many
            sessions.
        allow_unused: accept bindings that nothing reads, for a file that several runs share.

    Raises:
        ConfigError: an argument out of its range, or a gin scope that does nothing.
    """
    if mode not in MODES:
        raise ConfigError(f"hpgr.run.mode takes one of {list(MODES)}, got {mode!r}")
    if not seeds:
        raise ConfigError("hpgr.run.seeds takes at least one seed, got none")
    check_scopes()
    if not allow_unused:
        check_unused()
    directory = Path(output_dir)
    with process_group() as process:
        data = build("prepare_data")
        LOG.info("%s", data.summary())
        task = Task(data, build("RequestSettings"), process, session_gap_seconds)
        if mode == "ablation":
            metrics = run_ablation(task, rows, seeds=seeds, output_dir=directory, resume=resume)
        else:
            training = TrainingRun(seeds[0], directory, process, title=mode, resume=resume)
            metrics = _single(mode, task, training)
        if process.is_main:
            path = directory / ("evaluation.json" if mode == "evaluate" else "results.json")
            write_results(path, metrics, seeds=list(seeds))
            LOG.info("wrote %s", path)


def _single(mode: str, task: Task, training: TrainingRun) -> dict[str, Any]:
    """One stage, or the evaluation of its checkpoint."""
    if mode == "pretrain":
        stage1 = pretrain(task, build("PretrainSettings"), training)
        LOG.info("wrote %s", stage1.handoff)
        return {**asdict(stage1), "handoff": str(stage1.handoff)}
    if mode == "evaluate":
        metrics = evaluate(task, training.output_dir)
    else:
        metrics = finetune(task, build("FinetuneSettings"), training)
    if task.process.is_main:
        print(" ".join(f"{k}={v:.4f}" for k, v in metrics.items() if isinstance(v, float)))
    return metrics
