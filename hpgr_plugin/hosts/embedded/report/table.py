"""The table of an ablation: one line per model, mean and spread over the seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

# column title -> (key of the metrics of one seed, digits)
COLUMNS: dict[str, tuple[str, int]] = {
    "AUC": ("auc", 4),
    "GAUC": ("gauc", 4),
    "log loss": ("log_loss", 4),
    "NE": ("ne", 4),
    "AUC, many sessions": ("auc_many_sessions", 4),
    "kept tokens": ("kept_tokens", 2),
    "examples/s": ("examples_per_second", 0),
    "s/step": ("seconds_per_step", 4),
    "s/step, inference": ("inference_seconds_per_step", 4),
}
# The same of a further task: title, with its name behind, and key, with its name in front.
TASK_COLUMNS = {"AUC": "auc", "GAUC": "gauc"}
DIFFERENCES = {"AUC - best rival [95%]": "auc", "GAUC - best rival [95%]": "gauc"}


def task_metric(task: str, name: str) -> str:
    """The key of a metric of a further task."""
    return f"{task}/{name}"


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (0 for one value)."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return statistics.fmean(values), spread


def _cell(row: Row, key: str, digits: int) -> str:
    values = [metrics[key] for metrics in row["seeds"] if metrics.get(key) is not None]
    if not values:
        return "-"
    mean, spread = mean_and_spread(values)
    text = f"{mean:,.{digits}f}"
    return f"{text} ± {spread:.{digits}f}" if len(values) > 1 and digits > 1 else text


def _task_columns(rows: Sequence[Row]) -> dict[str, tuple[str, int]]:
    """Columns of the further tasks that any row has metrics of, as in `COLUMNS`."""
    keys = [key for row in rows for metrics in row["seeds"] for key in metrics if "/" in key]
    tasks = dict.fromkeys(key.partition("/")[0] for key in keys)
    return {
        f"{title}, {task}": (task_metric(task, name), 4)
        for task in tasks
        for title, name in TASK_COLUMNS.items()
    }


def _difference(row: Row, key: str) -> str:
    found = row.get("difference")
    if found is None:
        return "-"
    return "{value:+.4f} [{low:+.4f}, {high:+.4f}]".format(**found[key])


def comparison_note(rows: Sequence[Row]) -> list[str]:
    """The lines below the table that say what its differences are; none without differences."""
    rivals = {row["difference"]["from"] for row in rows if row.get("difference")}
    titles = [row["title"] for row in rows if row["scope"] in rivals] if rivals else []
    if not titles:
        return []
    return [
        "",
        f"Differences are from the best rival, {titles[0]}: metrics averaged over the seeds, 95% "
        "interval of a paired bootstrap over users.",
    ]


def tuning_note(rows: Sequence[Row]) -> list[str]:
    """The lines below the table that say how its learning rates were chosen."""
    chosen = {row["title"]: row["learning_rate"] for row in rows if "tries" in row}
    if not chosen:
        return []
    tries = next(row["tries"] for row in rows if "tries" in row)
    each = ", ".join(f"{title} {rate:g}" for title, rate in chosen.items())
    return [
        "",
        f"Every model was trained with the learning rates {', '.join(tries)} for the first seed, "
        f"and took the one of the best validation AUC: {each}.",
    ]


def markdown_table(rows: Sequence[Row]) -> str:
    """A markdown table; columns that no row has a value for are left out.

    Args:
        rows: dicts with `title` and `seeds`, the metrics of each seed; where they have one,
            `difference`, see `comparison.differences`.
    """
    columns = {
        title: (key, digits)
        for title, (key, digits) in {**COLUMNS, **_task_columns(rows)}.items()
        if any(metrics.get(key) is not None for row in rows for metrics in row["seeds"])
    }
    compared = DIFFERENCES if any(row.get("difference") for row in rows) else {}
    lines = [["model", *columns, *compared]]
    for row in rows:
        cells = [_cell(row, key, digits) for key, digits in columns.values()]
        lines.append([row["title"], *cells, *(_difference(row, key) for key in compared.values())])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [
        "| "
        + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        + " |"
        for line in lines
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([text[0], rule, *text[1:]])
