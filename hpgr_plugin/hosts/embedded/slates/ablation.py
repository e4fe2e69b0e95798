"""Slate models that differ by gin scope, over one stage 1, tokenizers and alignments: one table."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hpgr_plugin.config.registry import ConfigError, build
from hpgr_plugin.config.scopes import config_scope
from hpgr_plugin.data import check_splits
from hpgr_plugin.files import atomic_write
from hpgr_plugin.hosts.embedded.report.comparison import summary
from hpgr_plugin.hosts.embedded.report.evaluation import Task
from hpgr_plugin.hosts.embedded.report.results import write_results
from hpgr_plugin.hosts.embedded.report.table import mean_and_spread
from hpgr_plugin.hosts.embedded.slates.evaluation import OUTCOMES, difference, load_outcomes
from hpgr_plugin.hosts.embedded.slates.example import example_slate
from hpgr_plugin.hosts.embedded.slates.jobs import SlateJob, SlateJobs
from hpgr_plugin.hosts.embedded.slates.stages import TrainedSlates
from hpgr_plugin.hosts.embedded.slates.table import slate_tables
from hpgr_plugin.hosts.embedded.slates.tokenize import Tokenized
from hpgr_plugin.hosts.embedded.train.stages import Stage1

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class SlateRow:
    """One row of the table; its gin scope binds what the row changes.

    Attributes:
        title: first cell of the row.
        tokenizer: gin scope of the tokenizer that the row starts from; None for none. Rows with
            the same scope share one tokenizer per seed.
        start: scope of another row, earlier in the table, that this row aligns; None trains one.
        rival: whether it is one of the models that HiGR is compared with.
    """

    title: str
    tokenizer: str | None = None
    start: str | None = None
    rival: bool = False


def run_slate_ablation(
    task: Task,
    rows: Sequence[str],
    tokenizers: Sequence[str],
    *,
    seeds: Sequence[int],
    output_dir: Path,
    resume: bool = False,
    workers: int = 1,
) -> dict[str, Any]:
    """Train every tokenizer and every row for every seed; print and write the tables.

    Args:
        task: data and requests.
        rows: gin scopes with a `SlateRow`.
        tokenizers: gin scopes of tokenizers that are measured, besides those of the rows.
        seeds: of each.
        output_dir: for `table.md` and one folder per row and seed.
        resume: continue from the last checkpoints.
        workers: trainings at the same time, see `JobPool`.

    Returns:
        `{"rows": [...], "tokenizers": {scope: [metrics of each seed]}, "best_rival": scope or None,
        "example": text}`.

    Raises:
        ConfigError: no rows, a row without a title, or one that aligns no earlier row.
    """
    settings = _settings(rows)
    check_splits(task.data, task.requests)
    table: list[dict[str, Any]] = [
        {"scope": row, **asdict(settings[row]), "seeds": []} for row in rows
    ]
    trainings = _Trainings(SlateJobs(task, output_dir, resume, workers), table, settings, seeds)
    trainings.pretrain()
    trainings.tokenize(tokenizers)
    trainings.train()
    measured = trainings.measured
    rival = _best_rival(table)
    example = ""
    if task.process.is_main:
        _compare(table, rival, seeds=seeds, output_dir=output_dir)
        example = example_slate(task, output_dir / f"{_last_own(table)}_seed{seeds[0]}")
        text = slate_tables(table, measured, rival)
        with atomic_write(output_dir / "table.md") as path:
            path.write_text(text + "\n\n" + example + "\n")
        print(text, example, sep="\n\n")
    return {"rows": table, "tokenizers": measured, "best_rival": rival, "example": example}


@dataclass
class _Trainings:
    """All trainings of an ablation and what came out of them.

    Attributes:
        jobs: runs them.
        table: one line per row, to be filled.
        settings: scope -> its row.
        seeds: of each row.
        handoffs: seed -> hand-over of stage 1.
        tokens: (scope, seed) -> tokens.
        models: (scope of a row, seed) -> trained slates.
        measured: scope of a tokenizer -> metrics of each seed.
    """

    jobs: SlateJobs
    table: list[dict[str, Any]]
    settings: dict[str, SlateRow]
    seeds: Sequence[int]
    handoffs: dict[int, Path] = field(default_factory=dict)
    tokens: dict[tuple[str, int], Tokenized] = field(default_factory=dict)
    models: dict[tuple[str, int], TrainedSlates] = field(default_factory=dict)
    measured: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def pretrain(self) -> None:
        """Stage 1 of every seed."""
        jobs = [SlateJob("pretrain", "stage1", "stage 1", seed) for seed in self.seeds]
        for job, result in self.jobs.run(jobs):
            assert isinstance(result, Stage1)
            self.handoffs[job.seed] = result.handoff

    def tokenize(self, tokenizers: Sequence[str]) -> None:
        """These tokenizers, and those of the rows."""
        scopes = {s.tokenizer for s in self.settings.values() if s.tokenizer is not None}
        every = list(dict.fromkeys([*tokenizers, *sorted(scopes)]))
        jobs = [
            SlateJob("tokenize", scope, scope, seed, handoff=self.handoffs[seed])
            for seed in self.seeds
            for scope in every
        ]
        for job, result in self.jobs.run(jobs):
            assert isinstance(result, Tokenized)
            self.tokens[job.scope, job.seed] = result
        self.measured = {
            scope: [self.tokens[scope, seed].metrics for seed in self.seeds] for scope in every
        }

    def train(self) -> None:
        """Every row and seed: those that align another row after that row."""
        waiting = list(self.settings)
        while waiting:
            ready = [row for row in waiting if self.settings[row].start not in waiting]
            jobs = [self._job(row, seed) for seed in self.seeds for row in ready]
            for job, result in self.jobs.run(jobs):
                assert isinstance(result, TrainedSlates)
                self.models[job.scope, job.seed] = result
                found = _ndcg_of(result.metrics)
                LOG.info("%s, seed %d: test NDCG %.4f", job.title, job.seed, found)
                self._write()
            waiting = [row for row in waiting if row not in ready]

    def _job(self, scope: str, seed: int) -> SlateJob:
        row = self.settings[scope]
        tokens = None if row.tokenizer is None else self.tokens[row.tokenizer, seed].tokens
        if row.start is None:
            handoff = self.handoffs[seed]
            return SlateJob("slates", scope, row.title, seed, handoff=handoff, tokens=tokens)
        model = self.models[row.start, seed].model
        return SlateJob("align", scope, row.title, seed, tokens=tokens, model=model)

    def _write(self) -> None:
        """Fill the table; an interrupted run keeps the rows that it finished."""
        for line in self.table:
            scope = line["scope"]
            finished = [seed for seed in self.seeds if (scope, seed) in self.models]
            line["seeds"] = [self.models[scope, seed].metrics for seed in finished]
        if self.jobs.task.process.is_main:
            so_far = {"rows": self.table, "tokenizers": self.measured}
            write_results(self.jobs.output_dir / "results.json", so_far, seeds=list(self.seeds))


def _settings(rows: Sequence[str]) -> dict[str, SlateRow]:
    if not rows:
        raise ConfigError("hpgr.run.rows takes the gin scopes of slate rows, got none")
    settings: dict[str, SlateRow] = {}
    for row in rows:
        with config_scope(row):
            settings[row] = build("SlateRow")
        if (start := settings[row].start) is not None and start not in settings:
            raise ConfigError(
                f"{row}/hpgr.SlateRow.start takes a row before it in hpgr.run.rows, got {start!r}"
            )
    return settings


def _ndcg_of(metrics: dict[str, Any]) -> float:
    return float(next(value for name, value in metrics.items() if name.startswith("ndcg@")))


def _ndcg(line: dict[str, Any]) -> float:
    """The mean over the seeds."""
    return mean_and_spread([_ndcg_of(metrics) for metrics in line["seeds"]])[0]


def _best_rival(table: list[dict[str, Any]]) -> str | None:
    rivals = [line for line in table if line["rival"]]
    return None if not rivals else str(max(rivals, key=_ndcg)["scope"])


def _last_own(table: list[dict[str, Any]]) -> str:
    """The row of HiGR with the best NDCG, or the last row."""
    own = [line for line in table if not line["rival"]]
    return str(max(own, key=_ndcg)["scope"] if own else table[-1]["scope"])


def _compare(
    table: list[dict[str, Any]], rival: str | None, *, seeds: Sequence[int], output_dir: Path
) -> None:
    """Add means over the seeds, and the differences from the best rival."""
    found = {
        line["scope"]: [
            load_outcomes(output_dir / f"{line['scope']}_seed{seed}" / OUTCOMES) for seed in seeds
        ]
        for line in table
    }
    for line in table:
        line["summary"] = summary(line["seeds"])
        if rival is not None and line["scope"] != rival:
            line["difference"] = {
                "from": rival,
                **{
                    metric: asdict(difference(found[line["scope"]], found[rival], metric))
                    for metric in ("hit", "ndcg")
                },
            }
