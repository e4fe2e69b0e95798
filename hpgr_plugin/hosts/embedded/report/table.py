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
}


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


def markdown_table(rows: Sequence[Row]) -> str:
    """A markdown table; columns that no row has a value for are left out.

    Args:
        rows: dicts with `title` and `seeds`, the metrics of each seed.
    """
    columns = {
        title: (key, digits)
        for title, (key, digits) in COLUMNS.items()
        if any(metrics.get(key) is not None for row in rows for metrics in row["seeds"])
    }
    lines = [["model", *columns]]
    for row in rows:
        cells = (_cell(row, key, digits) for key, digits in columns.values())
        lines.append([row["title"], *cells])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [
        "| "
        + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        + " |"
        for line in lines
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([text[0], rule, *text[1:]])
