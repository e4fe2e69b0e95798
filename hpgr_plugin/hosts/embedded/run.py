"""The run file's verb: what to do with the configured data, model and stages."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gin

from hpgr_plugin.config.scopes import check_scopes
from hpgr_plugin.data.prepare import PreparedData, prepare_data
from hpgr_plugin.hosts.embedded.report.ablation import run_ablation
from hpgr_plugin.hosts.embedded.report.results import write_results
from hpgr_plugin.hosts.embedded.train.distributed import Process, process_group
from hpgr_plugin.hosts.embedded.train.stages import evaluate, finetune, pretrain

LOG = logging.getLogger(__name__)
MODES = ("pretrain", "finetune", "evaluate", "ablation")


@gin.configurable(module="hpgr")
def run(
    *,
    mode: str = gin.REQUIRED,
    output_dir: str = gin.REQUIRED,
    seeds: Sequence[int] = (0,),
    rows: Sequence[str] = (),
    resume: bool = False,
) -> None:
    """Do what ``mode`` says and write ``output_dir/results.json``.

    An evaluation writes ``evaluation.json``: the training's own results stay.

    Args:
        mode: ``"pretrain"``, ``"finetune"``, ``"evaluate"`` or ``"ablation"``.
        output_dir: everything the run writes goes here.
        seeds: one training a seed in an ablation; the first one elsewhere.
        rows: (ablation) gin scopes, one a row of the table.
        resume: go on from the last checkpoints in ``output_dir``.
    """
    if mode not in MODES:
        raise ValueError(f"hpgr.run.mode takes one of {list(MODES)}, got {mode!r}")
    if not seeds:
        raise ValueError("hpgr.run.seeds takes at least one seed, got none")
    check_scopes()
    with process_group() as process:
        data = prepare_data()
        LOG.info("%s", data.summary())
        directory = Path(output_dir)
        if mode == "ablation":
            figures: dict[str, Any] = run_ablation(
                data, rows=rows, seeds=seeds, output_dir=directory, process=process, resume=resume
            )
        else:
            figures = _single(mode, data, seeds[0], directory, process, resume)
        if process.is_main:
            path = directory / ("evaluation.json" if mode == "evaluate" else "results.json")
            write_results(path, figures, seeds=list(seeds))
            LOG.info("wrote %s", path)


def _single(
    mode: str, data: PreparedData, seed: int, output_dir: Path, process: Process, resume: bool
) -> dict[str, Any]:
    if mode == "pretrain":
        stage1 = pretrain(data, seed=seed, output_dir=output_dir, process=process, resume=resume)
        LOG.info("wrote %s", stage1.handoff)
        return {**asdict(stage1), "handoff": str(stage1.handoff)}
    if mode == "evaluate":
        figures = evaluate(data, output_dir=output_dir, process=process)
    else:
        figures = finetune(data, seed=seed, output_dir=output_dir, process=process, resume=resume)
    if process.is_main:
        print(" ".join(f"{k}={v:.4f}" for k, v in figures.items() if isinstance(v, float)))
    return figures
