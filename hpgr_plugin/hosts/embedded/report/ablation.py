"""An ablation: models that differ only by gin scope, over shared stage-1 hand-overs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hpgr_plugin.config.registry import ConfigError, build
from hpgr_plugin.config.scopes import config_scope
from hpgr_plugin.files import atomic_write
from hpgr_plugin.hosts.embedded.report.comparison import best_rival, differences, summary
from hpgr_plugin.hosts.embedded.report.evaluation import Task
from hpgr_plugin.hosts.embedded.report.jobs import Job, Jobs
from hpgr_plugin.hosts.embedded.report.plots import plot_ablation
from hpgr_plugin.hosts.embedded.report.predictions import PREDICTIONS, load_predictions
from hpgr_plugin.hosts.embedded.report.results import write_results
from hpgr_plugin.hosts.embedded.report.table import (
    comparison_note,
    markdown_table,
    mean_and_spread,
    tuning_note,
)
from hpgr_plugin.hosts.embedded.train.stages import Stage1, item_mean

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
    learning_rates: Sequence[float] = (),
    workers: int = 1,
) -> dict[str, Any]:
    """Train every row for every seed; print and write the table, and draw the plot.

    Args:
        task: data, requests and metrics; the requests are those of the baseline, each row reads
            its own in its scope.
        rows: gin scopes.
        seeds: of each row.
        output_dir: for `table.md`, `ablation.png` and one folder per row and seed.
        resume: continue from the last checkpoints.
        learning_rates: of stage 2. Each row is trained with each of them for the first seed, and
            takes the one of the best validation AUC for all seeds. None: the bound one.
        workers: trainings at the same time.

    Returns:
        `{"rows": [...], "stage1": {...}, "warnings": [...], "best_rival": scope or None}`. A row
        has what its `AblationRow` says, "scope", "seeds" (the metrics of each), "summary" (mean and
        standard deviation over the seeds), "difference" (from the best rival, see
        `comparison.differences`), and with `learning_rates` "tries" (the validation AUC of each)
        and "learning_rate".

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
    trainings = _Trainings(
        jobs=Jobs(task, output_dir, resume, workers), table=table, settings=settings, seeds=seeds
    )
    trainings.pretrain()
    if learning_rates:
        trainings.choose(learning_rates)
    trainings.finetune()
    warnings = _below_baseline(table)
    rival = best_rival(table)
    if task.process.is_main:
        _add_statistics(table, rival, output_dir=output_dir)
        _publish(table, warnings, output_dir)
    return {**trainings.so_far(), "warnings": warnings, "best_rival": rival}


@dataclass
class _Trainings:
    """All trainings of an ablation and what came out of them.

    Attributes:
        jobs: runs them.
        table: the item mean, then one line per row, to be filled.
        settings: scope -> its row.
        seeds: of each row.
        handed: stage-1 scope -> seed -> its result.
        done: finished trainings of stage 2.
    """

    jobs: Jobs
    table: list[dict[str, Any]]
    settings: dict[str, AblationRow]
    seeds: Sequence[int]
    handed: dict[str, dict[int, Stage1]] = field(default_factory=dict)
    done: dict[Job, dict[str, Any]] = field(default_factory=dict)

    def pretrain(self) -> None:
        """Stage 1 of every scope that a row starts from."""
        scopes = sorted({row.stage1 for row in self.settings.values() if row.stage1 is not None})
        jobs = [Job(scope, scope, seed, is_stage1=True) for seed in self.seeds for scope in scopes]
        self.handed = {scope: {} for scope in scopes}
        for job, result in self.jobs.run(jobs):
            assert isinstance(result, Stage1)
            self.handed[job.scope][job.seed] = result
            LOG.info(
                "stage 1 of %s, seed %d: loss %.3f", job.title, job.seed, result.metrics["loss"]
            )

    def choose(self, learning_rates: Sequence[float]) -> None:
        """The learning rate of every row: that of the best validation for the first seed."""
        lines = self.table[1:]
        self._train([self._job(x, self.seeds[0], rate) for x in lines for rate in learning_rates])
        for line in lines:
            tries = {
                rate: max(
                    validation["auc"]
                    for validation in self.done[self._job(line, self.seeds[0], rate)]["history"]
                )
                for rate in learning_rates
            }
            line["tries"] = {f"{rate:g}": auc for rate, auc in tries.items()}
            line["learning_rate"] = max(tries, key=lambda rate: tries[rate])

    def finetune(self) -> None:
        """Stage 2 of every row and seed."""
        jobs = [self._job(line, seed) for seed in self.seeds for line in self.table[1:]]
        self._train([job for job in jobs if job not in self.done])
        for line in self.table[1:]:
            finished = [self._job(line, seed) for seed in self.seeds]
            line["seeds"] = [self.done[job] for job in finished]
            line["folders"] = [job.folder for job in finished]

    def so_far(self) -> dict[str, Any]:
        """What results.json shows of it."""
        stage1 = {
            scope: [runs[seed].metrics for seed in self.seeds if seed in runs]
            for scope, runs in self.handed.items()
        }
        return {"rows": self.table, "stage1": stage1}

    def _job(self, line: dict[str, Any], seed: int, rate: float | None = None) -> Job:
        start = self.settings[line["scope"]].stage1
        return Job(
            scope=line["scope"],
            title=line["title"],
            seed=seed,
            handoff=None if start is None else self.handed[start][seed].handoff,
            learning_rate=line.get("learning_rate") if rate is None else rate,
        )

    def _train(self, jobs: Sequence[Job]) -> None:
        lines = {line["scope"]: line for line in self.table}
        for job, metrics in self.jobs.run(jobs):
            assert isinstance(metrics, dict)
            self.done[job] = metrics
            rate = "" if job.learning_rate is None else f", learning rate {job.learning_rate:g}"
            LOG.info("%s, seed %d%s: test AUC %.4f", job.title, job.seed, rate, metrics["auc"])
            line = lines[job.scope]
            if job.learning_rate == line.get("learning_rate"):  # otherwise it is a try
                line["seeds"].append(metrics)
            if self.jobs.task.process.is_main:  # an interrupted run keeps the rows it finished
                path = self.jobs.output_dir / "results.json"
                write_results(path, {**self.so_far(), "warnings": []}, seeds=list(self.seeds))


def _in_scope(scope: str, name: str) -> Any:
    with config_scope(scope):
        return build(name)


def _add_statistics(table: list[dict[str, Any]], rival: str | None, *, output_dir: Path) -> None:
    """Add to every row its mean over the seeds and its difference from the best rival."""
    for line in table:
        line["summary"] = summary(line["seeds"])
    if rival is None:
        return
    predictions = {
        line["scope"]: [
            load_predictions(output_dir / folder / PREDICTIONS) for folder in line["folders"]
        ]
        for line in table[1:]
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
    text = "\n".join([markdown_table(table), *comparison_note(table), *tuning_note(table)])
    with atomic_write(output_dir / "table.md") as path:
        path.write_text(text + "\n")
    print(text)
    for sentence in warnings:
        print(f"WARNING: {sentence}")
    if not warnings:
        print("Every model beats the item mean.")
    if not plot_ablation(table, output_dir / "ablation.png"):
        print("No plot: matplotlib is not installed (extra 'analysis').")
