"""An ablation: models that differ only by gin scope, over shared stage-1 hand-overs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hpgr_plugin.config.registry import ConfigError, build
from hpgr_plugin.config.scopes import config_scope
from hpgr_plugin.files import atomic_write
from hpgr_plugin.hosts.embedded.report.comparison import best_rival, differences, summary
from hpgr_plugin.hosts.embedded.report.evaluation import Task
from hpgr_plugin.hosts.embedded.report.plots import plot_ablation
from hpgr_plugin.hosts.embedded.report.predictions import PREDICTIONS, load_predictions
from hpgr_plugin.hosts.embedded.report.results import write_results
from hpgr_plugin.hosts.embedded.report.table import (
    comparison_note,
    markdown_table,
    mean_and_spread,
)
from hpgr_plugin.hosts.embedded.train.stages import Stage1, finetune, item_mean, pretrain
from hpgr_plugin.hosts.embedded.train.trainer import TrainingRun

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class AblationRow:
    """One row of the table; its gin scope binds what the row changes.

    Attributes:
        title: first cell of the row.
        stage1: gin scope of the stage 1 that the row starts from; None for none. Rows with the
            same scope share one pre-training per seed.
        rival: whether it is one of the models that HPGR is compared with; the best of them is
            what the differences in the table are taken from.
        figure: name of the figure that the row is a point of, see `hpgr_plugin.report`.
        series: name of its line there.
        x: its place on the horizontal axis.
    """

    title: str
    stage1: str | None = None
    rival: bool = False
    figure: str | None = None
    series: str = ""
    x: float | None = None


def run_ablation(
    task: Task,
    rows: Sequence[str],
    *,
    seeds: Sequence[int],
    output_dir: Path,
    resume: bool = False,
) -> dict[str, Any]:
    """Train every row for every seed; print and write the table, and draw the plot.

    Args:
        task: data, requests and metrics; the requests are those of the baseline, each row reads
            its own in its scope.
        rows: gin scopes.
        seeds: of each row.
        output_dir: for `table.md`, `ablation.png` and one folder per row and seed.
        resume: continue from the last checkpoints.

    Returns:
        `{"rows": [...], "stage1": {...}, "warnings": [...], "best_rival": scope or None}`. A row
        has what its `AblationRow` says, "scope", "seeds" (the metrics of each), "summary" (mean and
        standard deviation over the seeds) and "difference" (from the best rival, see
        `comparison.differences`).

    Raises:
        ConfigError: no rows, or a row without a title.
    """
    if not rows:
        raise ConfigError("hpgr.run.rows takes the gin scopes of an ablation's rows, got none")
    settings = {row: _in_scope(row, "AblationRow") for row in rows}
    baseline = item_mean(task, output_dir / "item_mean")
    table: list[dict[str, Any]] = [
        {"scope": "item_mean", **asdict(AblationRow("item mean")), "seeds": [baseline]}
    ]
    table += [{"scope": row, **asdict(settings[row]), "seeds": []} for row in rows]
    stage1_scopes = sorted({s.stage1 for s in settings.values() if s.stage1 is not None})
    stage1: dict[str, list[dict[str, Any]]] = {scope: [] for scope in stage1_scopes}

    def training(scope: str, title: str, seed: int) -> TrainingRun:
        return TrainingRun(
            seed=seed,
            output_dir=output_dir / f"{scope}_seed{seed}",
            process=task.process,
            title=f"{title} (seed {seed})",
            resume=resume,
        )

    for seed in seeds:
        handed: dict[str, Stage1] = {}
        for scope, runs in stage1.items():
            with config_scope(scope):
                handed[scope] = pretrain(
                    task, build("PretrainSettings"), training(scope, scope, seed)
                )
            runs.append(handed[scope].metrics)
        for line in table[1:]:
            scope, title = line["scope"], line["title"]
            start = settings[scope].stage1
            with config_scope(scope):
                metrics = finetune(
                    replace(task, requests=build("RequestSettings")),
                    build("FinetuneSettings"),
                    training(scope, title, seed),
                    pretrained=None if start is None else handed[start].handoff,
                )
            line["seeds"].append(metrics)
            LOG.info("%s, seed %d: test AUC %.4f", title, seed, metrics["auc"])
            if task.process.is_main:  # an interrupted run keeps the rows that it finished
                so_far = {"rows": table, "stage1": stage1, "warnings": []}
                write_results(output_dir / "results.json", so_far, seeds=list(seeds))
    warnings = _below_baseline(table)
    rival = best_rival(table)
    if task.process.is_main:
        _add_statistics(table, rival, seeds=seeds, output_dir=output_dir)
        _publish(table, warnings, output_dir)
    return {"rows": table, "stage1": stage1, "warnings": warnings, "best_rival": rival}


def _in_scope(scope: str, name: str) -> Any:
    with config_scope(scope):
        return build(name)


def _add_statistics(
    table: list[dict[str, Any]], rival: str | None, *, seeds: Sequence[int], output_dir: Path
) -> None:
    """Add to every row its mean over the seeds and its difference from the best rival."""
    for line in table:
        line["summary"] = summary(line["seeds"])
    if rival is None:
        return
    predictions = {
        scope: [
            load_predictions(output_dir / f"{scope}_seed{seed}" / PREDICTIONS) for seed in seeds
        ]
        for scope in (line["scope"] for line in table[1:])
    }
    predictions["item_mean"] = [load_predictions(output_dir / "item_mean" / PREDICTIONS)]
    found = differences(predictions, rival)
    for line in table:
        if line["scope"] in found:
            line["difference"] = {"from": rival, **found[line["scope"]]}


def _below_baseline(table: list[dict[str, Any]]) -> list[str]:
    """A sentence for every model that does not beat the item mean."""
    baseline = table[0]["seeds"][0]["auc"]
    sentences = []
    for line in table[1:]:
        mean, _ = mean_and_spread([metrics["auc"] for metrics in line["seeds"]])
        if mean <= baseline:
            sentences.append(
                f"{line['title']} did NOT beat the item mean: AUC {mean:.4f} against {baseline:.4f}"
            )
    return sentences


def _publish(table: list[dict[str, Any]], warnings: list[str], output_dir: Path) -> None:
    text = "\n".join([markdown_table(table), *comparison_note(table)])
    with atomic_write(output_dir / "table.md") as path:
        path.write_text(text + "\n")
    print(text)
    for sentence in warnings:
        print(f"WARNING: {sentence}")
    if not warnings:
        print("Every model beats the item mean.")
    if not plot_ablation(table, output_dir / "ablation.png"):
        print("No plot: matplotlib is not installed (extra 'analysis').")
