"""Slate models that differ by gin scope, over one stage 1, tokenizers and alignments: one table."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
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
from hpgr_plugin.hosts.embedded.slates.stages import MODEL, align, train_slates
from hpgr_plugin.hosts.embedded.slates.table import slate_tables
from hpgr_plugin.hosts.embedded.slates.tokenize import Tokenized, tokenize
from hpgr_plugin.hosts.embedded.train.stages import pretrain
from hpgr_plugin.hosts.embedded.train.trainer import TrainingRun

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
) -> dict[str, Any]:
    """Train every tokenizer and every row for every seed; print and write the tables.

    Args:
        task: data and requests.
        rows: gin scopes with a `SlateRow`.
        tokenizers: gin scopes of tokenizers that are measured, besides those of the rows.
        seeds: of each.
        output_dir: for `table.md` and one folder per row and seed.
        resume: continue from the last checkpoints.

    Returns:
        `{"rows": [...], "tokenizers": {scope: [metrics of each seed]}, "best_rival": scope or None,
        "example": text}`.

    Raises:
        ConfigError: no rows, a row without a title, or one that aligns no earlier row.
    """
    settings = _settings(rows)
    check_splits(task.data, task.requests)
    scopes = {s.tokenizer for s in settings.values() if s.tokenizer is not None}
    every = list(dict.fromkeys([*tokenizers, *sorted(scopes)]))
    measured: dict[str, list[dict[str, Any]]] = {scope: [] for scope in every}
    table: list[dict[str, Any]] = [
        {"scope": row, **asdict(settings[row]), "seeds": []} for row in rows
    ]

    def training(scope: str, title: str, seed: int) -> TrainingRun:
        folder = output_dir / f"{scope}_seed{seed}"
        return TrainingRun(seed, folder, task.process, f"{title} (seed {seed})", resume)

    for seed in seeds:
        stage1 = pretrain(task, build("PretrainSettings"), training("stage1", "stage 1", seed))
        tokens: dict[str, Tokenized] = {}
        for scope in every:
            run = training(scope, scope, seed)
            with config_scope(scope):
                reads = build("TokenizeSettings", embeddings=str(stage1.handoff))
                made = tokenize(task.data, reads, run)
            tokens[scope] = made
            measured[scope].append(made.metrics)
        for line in table:
            scope, row = line["scope"], settings[line["scope"]]
            given = {} if row.tokenizer is None else {"tokens": str(tokens[row.tokenizer].tokens)}
            run = training(scope, row.title, seed)
            with config_scope(scope):
                if row.start is None:
                    slates = build("SlateSettings", **given)
                    trained = train_slates(task, slates, run, pretrained=stage1.handoff)
                else:
                    given["model"] = str(output_dir / f"{row.start}_seed{seed}" / MODEL)
                    trained = align(task, build("AlignSettings", **given), run)
            line["seeds"].append(trained.metrics)
            LOG.info("%s, seed %d: test NDCG %.4f", row.title, seed, _ndcg(line, seed=-1))
            if task.process.is_main:  # an interrupted run keeps the rows that it finished
                so_far = {"rows": table, "tokenizers": measured}
                write_results(output_dir / "results.json", so_far, seeds=list(seeds))
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


def _ndcg(line: dict[str, Any], seed: int | None = None) -> float:
    """Of one seed by its place, or the mean."""
    name = next(name for name in line["seeds"][0] if name.startswith("ndcg@"))
    values = [metrics[name] for metrics in line["seeds"]]
    return mean_and_spread(values)[0] if seed is None else values[seed]


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
