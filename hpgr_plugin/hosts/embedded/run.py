"""`hpgr.run`: what the entry points do with the configured data, model and stages."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from hpgr_plugin.config.bindings import bound_values, check_unused
from hpgr_plugin.config.registry import ConfigError, build
from hpgr_plugin.config.scopes import check_scopes
from hpgr_plugin.data.events import require
from hpgr_plugin.hosts.embedded.report.ablation import run_ablation
from hpgr_plugin.hosts.embedded.report.evaluation import GaucBy, Task
from hpgr_plugin.hosts.embedded.report.results import write_results
from hpgr_plugin.hosts.embedded.slates.ablation import run_slate_ablation
from hpgr_plugin.hosts.embedded.slates.stages import align, train_slates
from hpgr_plugin.hosts.embedded.slates.tokenize import tokenize
from hpgr_plugin.hosts.embedded.train.distributed import Process, process_group
from hpgr_plugin.hosts.embedded.train.run_directory import (
    RunIdentity,
    check_trained_with,
    open_run,
)
from hpgr_plugin.hosts.embedded.train.stages import evaluate, finetune, pretrain
from hpgr_plugin.hosts.embedded.train.trainer import TrainingRun

LOG = logging.getLogger(__name__)
MODES = ("pretrain", "finetune", "evaluate", "ablation")
_TABLES = {"pretrain": "hpgr.MaskedItemModel.tables", "finetune": "hpgr.HSTURanker.tables"}
SLATE_MODES = ("tokenize", "slates", "align", "slate_ablation")


def run(
    *,
    mode: str,
    output_dir: str,
    seeds: Sequence[int] = (0,),
    rows: Sequence[str] = (),
    tokenizers: Sequence[str] = (),
    overwrite: bool = False,
    session_gap_seconds: int = 1800,
    gauc_by: GaucBy = "user",
    learning_rates: Sequence[float] = (),
    workers: int = 1,
    allow_unused: Sequence[str] = (),
) -> None:
    """Run `mode` and write `output_dir/results.json`.

    An evaluation writes `evaluation.json` instead, so that the results of the training stay.

    Args:
        mode: "pretrain", "finetune", "evaluate" or "ablation"; of slates "tokenize", "slates",
            "align" or "slate_ablation".
        output_dir: folder of everything that the run writes.
        seeds: of an ablation, one training of each row per seed; other modes take the first one.
        rows: gin scopes of an ablation, one per row of its table.
        tokenizers: gin scopes of tokenizers that an ablation of slates measures, besides those
            of its rows.
        overwrite: start anew. Otherwise an unfinished run of the same configuration, data, seeds
            and number of processes continues from its checkpoints, a finished one is left as it
            is, and one that differs is an error.
        session_gap_seconds: longest pause inside a session, for the AUC of users with many
            sessions.
        gauc_by: "user" or "impression": whose candidates GAUC compares.
        learning_rates: of an ablation: each row takes the best of these on validation, see
            `run_ablation`. None: `FinetuneSettings.learning_rate`.
        workers: of both ablations: trainings at the same time, which share the cores and the CUDA
            devices. Sums on a CPU depend on the number of threads in their last digits.
        allow_unused: names whose bindings may stay unread, for files that several runs share.

    Raises:
        ConfigError: an argument out of its range, or a gin scope that does nothing.
        RunError: `output_dir` is in use, or holds a run that differs.
    """
    if mode not in MODES + SLATE_MODES:
        raise ConfigError(f"hpgr.run.mode takes one of {[*MODES, *SLATE_MODES]}, got {mode!r}")
    if not seeds:
        raise ConfigError("hpgr.run.seeds takes at least one seed, got none")
    for seed in seeds:
        require(seed >= 0, "run.seeds", "numbers of 0 or more", seed)
    require(session_gap_seconds >= 0, "run.session_gap_seconds", "0 or more", session_gap_seconds)
    fits = gauc_by in get_args(GaucBy)
    require(fits, "run.gauc_by", "'user' or 'impression'", gauc_by)
    require(bool(output_dir), "run.output_dir", "a folder", output_dir)
    require(workers >= 1, "run.workers", "1 or more", workers)
    for rate in learning_rates:
        require(0 < rate < math.inf, "run.learning_rates", "numbers above 0", rate)
    check_scopes()
    check_unused(allow_unused)
    directory = Path(output_dir)
    with process_group() as process:
        data = build("prepare_data")
        LOG.info("%s", data.summary())
        if mode in SLATE_MODES:
            tasks = list(data.log.task_labels)
            require(not tasks, "prepare_data.tasks", f"no tasks in mode {mode!r}", tasks)
        task = Task(data, build("RequestSettings"), process, session_gap_seconds, gauc_by)
        bindings = bound_values() | {"hpgr.run.mode": "finetune" if mode == "evaluate" else mode}
        processes = None if _reshards(mode, bindings) else process.world_size
        identity = RunIdentity(bindings, data.digest(), list(seeds), processes)
        if mode == "evaluate":
            check_trained_with(directory, identity)
            metrics = _shown(evaluate(task, directory), process)
            _write("evaluation.json", metrics, directory, seeds, process)
            return
        with open_run(directory, identity, overwrite=overwrite, process=process) as state:
            if state == "finished":
                LOG.info(
                    "%s holds the finished run of this configuration: nothing to do "
                    "(hpgr.run.overwrite = True trains it again)",
                    directory,
                )
                return
            resume = state == "unfinished"
            where: dict[str, Any] = {"seeds": seeds, "output_dir": directory, "resume": resume}
            fits = workers == 1 or process.world_size == 1
            require(fits, "run.workers", "1 under torchrun", workers)
            if mode == "ablation":
                metrics = run_ablation(
                    task,
                    rows,
                    **where,
                    learning_rates=learning_rates,
                    workers=workers,
                )
            elif mode == "slate_ablation":
                metrics = run_slate_ablation(task, rows, tokenizers, **where, workers=workers)
            else:
                training = TrainingRun(seeds[0], directory, process, title=mode, resume=resume)
                metrics = _single(mode, task, training)
            _write("results.json", metrics, directory, seeds, process)


def _reshards(mode: str, bindings: Mapping[str, str]) -> bool:
    """Whether other numbers of processes can continue the run: a stage with a sharded table."""
    return mode in _TABLES and bindings.get(_TABLES[mode], "dense") != "dense"


def _write(
    name: str, metrics: dict[str, Any], directory: Path, seeds: Sequence[int], process: Process
) -> None:
    if process.is_main:
        write_results(directory / name, metrics, seeds=list(seeds))
        LOG.info("wrote %s", directory / name)


def _single(mode: str, task: Task, training: TrainingRun) -> dict[str, Any]:
    """One stage."""
    if mode == "pretrain":
        stage1 = pretrain(task, build("PretrainSettings"), training)
        LOG.info("wrote %s", stage1.handoff)
        return {**asdict(stage1), "handoff": str(stage1.handoff)}
    if mode == "tokenize":
        made = tokenize(task.data, build("TokenizeSettings"), training)
        LOG.info("wrote %s", made.tokens)
        return _shown({**made.metrics, "tokens": str(made.tokens)}, task.process)
    if mode in ("slates", "align"):
        if mode == "slates":
            slates = train_slates(task, build("SlateSettings"), training)
        else:
            slates = align(task, build("AlignSettings"), training)
        LOG.info("wrote %s", slates.model)
        return _shown({**slates.metrics, "model": str(slates.model)}, task.process)
    return _shown(finetune(task, build("FinetuneSettings"), training), task.process)


def _shown(metrics: dict[str, Any], process: Process) -> dict[str, Any]:
    """The metrics, after printing those that are numbers."""
    if process.is_main:
        print(" ".join(f"{k}={v:.4f}" for k, v in metrics.items() if isinstance(v, float)))
    return metrics
