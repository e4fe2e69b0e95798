"""An ablation: models that differ by gin scope alone, over shared stage-1 hand-overs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gin

from hpgr_plugin.data.prepare import PreparedData
from hpgr_plugin.hosts.embedded.report.plots import plot_ablation
from hpgr_plugin.hosts.embedded.report.results import write_results
from hpgr_plugin.hosts.embedded.report.table import markdown_table, mean_and_spread
from hpgr_plugin.hosts.embedded.train.distributed import Process
from hpgr_plugin.hosts.embedded.train.stages import Stage1, finetune, item_mean, pretrain

LOG = logging.getLogger(__name__)


@gin.configurable("row", module="hpgr")
@dataclass(frozen=True)
class RowSettings:
    """One row of the table, read inside the row's gin scope.

    Attributes:
        title: the first cell of the row.
        stage1: gin scope of the stage 1 that the row starts from, None for none. Rows that name
            the same scope share one pre-training a seed.
    """

    title: str = gin.REQUIRED
    stage1: str | None = None


def run_ablation(
    data: PreparedData,
    *,
    rows: Sequence[str],
    seeds: Sequence[int],
    output_dir: Path,
    process: Process,
    resume: bool = False,
) -> dict[str, Any]:
    """Train every row for every seed; print and write the table, and draw the plot.

    Args:
        data: prepared data.
        rows: gin scopes.
        seeds: of each row.
        output_dir: ``table.md``, ``ablation.png`` and a folder a row and seed.
        process: this process among its peers.
        resume: go on from the last checkpoints.

    Returns:
        ``{"rows": [{"scope", "title", "seeds": [figures]}], "stage1": {...}, "warnings": [...]}``.
    """
    if not rows:
        raise ValueError("hpgr.run.rows takes the gin scopes of an ablation's rows, got none")
    settings = {row: _settings(row) for row in rows}
    stage1_scopes = {s.stage1 for s in settings.values() if s.stage1 is not None}
    floor = {"scope": "item_mean", "title": "item mean", "seeds": [item_mean(data)]}
    table: list[dict[str, Any]] = [floor]
    table += [{"scope": row, "title": settings[row].title, "seeds": []} for row in rows]
    stage1: dict[str, list[dict[str, Any]]] = {scope: [] for scope in sorted(stage1_scopes)}
    for seed in seeds:
        handed: dict[str, Stage1] = {}
        for scope in stage1:
            with gin.config_scope(scope):
                handed[scope] = pretrain(
                    data,
                    seed=seed,
                    output_dir=output_dir / f"{scope}_seed{seed}",
                    process=process,
                    resume=resume,
                    title=f"{scope} (seed {seed})",
                )
            stage1[scope].append(handed[scope].figures)
        for line in table[1:]:
            row = line["scope"]
            start = settings[row].stage1
            with gin.config_scope(row):
                figures = finetune(
                    data,
                    seed=seed,
                    output_dir=output_dir / f"{row}_seed{seed}",
                    process=process,
                    resume=resume,
                    title=f"{line['title']} (seed {seed})",
                    pretrained=None if start is None else str(handed[start].handoff),
                )
            line["seeds"].append(figures)
            LOG.info("%s, seed %d: test AUC %.4f", line["title"], seed, figures["auc"])
            if process.is_main:  # a long run that is cut short has lost nothing it finished
                so_far = {"rows": table, "stage1": stage1, "warnings": []}
                write_results(output_dir / "results.json", so_far, seeds=list(seeds))
    warnings = _below_floor(table)
    if process.is_main:
        _publish(table, warnings, output_dir)
    return {"rows": table, "stage1": stage1, "warnings": warnings}


def _settings(row: str) -> RowSettings:
    with gin.config_scope(row):
        return RowSettings()


def _below_floor(table: list[dict[str, Any]]) -> list[str]:
    """A sentence for every model that does not beat the item mean."""
    floor = table[0]["seeds"][0]["auc"]
    sentences = []
    for line in table[1:]:
        mean, _ = mean_and_spread([figures["auc"] for figures in line["seeds"]])
        if mean <= floor:
            sentences.append(
                f"{line['title']} did NOT beat the item mean: AUC {mean:.4f} against {floor:.4f}"
            )
    return sentences


def _publish(table: list[dict[str, Any]], warnings: list[str], output_dir: Path) -> None:
    text = markdown_table(table)
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "table.md").write_text(text + "\n")
    print(text)
    for sentence in warnings:
        print(f"WARNING: {sentence}")
    if not warnings:
        print("Every model beats the item mean.")
    if not plot_ablation(table, output_dir / "ablation.png"):
        print("No plot: matplotlib is not installed (extra 'analysis').")
