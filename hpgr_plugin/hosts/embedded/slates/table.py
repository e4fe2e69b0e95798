"""The tables of a slate ablation: tokenizers, and slates by model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hpgr_plugin.hosts.embedded.report.table import mean_and_spread

Row = Mapping[str, Any]
TOKENIZER_COLUMNS = {
    "collisions": "collision_rate",
    "codebook use": "codebook_use",
    "least used level": "least_codebook_use",
    "consistency": "consistency",
}

SLATE_COLUMNS = ("hit@", "recall@", "ndcg@", "liked_hit@", "liked_recall@", "liked_ndcg@")


def slate_tables(
    rows: Sequence[Row], tokenizers: Mapping[str, Sequence[Row]], rival: str | None
) -> str:
    """Both tables in markdown.

    Args:
        rows: of `run_slate_ablation`.
        tokenizers: metrics of each seed by scope.
        rival: scope of the best rival, or None.
    """
    parts = []
    if tokenizers:
        lines = [["tokenizer", *TOKENIZER_COLUMNS]]
        for scope, seeds in sorted(tokenizers.items()):
            lines.append([scope, *(_cell(seeds, key) for key in TOKENIZER_COLUMNS.values())])
        parts.append(_markdown(lines))
        parts += [f"- {scope}: {text}" for scope, text in _warnings(tokenizers)]
    measured = rows[0]["seeds"][0] if rows else {}
    metrics = [name for start in SLATE_COLUMNS for name in measured if name.startswith(start)]
    compared = any(row.get("difference") for row in rows)
    lines = [["model", *(name.replace("_", " ") for name in metrics)]]
    lines[0] += ["NDCG - best rival [95%]", "relative"] if compared else []
    for row in rows:
        cells = [row["title"], *(_cell(row["seeds"], name) for name in metrics)]
        lines.append(cells + (_differences(row) if compared else []))
    parts.append(_markdown(lines))
    parts += [
        f"- {row['title']}: in {kept} of {len(row['seeds'])} trainings no validation was better "
        "than before it; the start was kept."
        for row in rows
        if (kept := sum(bool(seed.get("kept_start")) for seed in row["seeds"]))
    ]
    titles = [row["title"] for row in rows if row["scope"] == rival]
    if titles:
        parts.append(
            f"Differences are from the best rival, {titles[0]}: metrics averaged over the seeds, "
            "95% interval of a paired bootstrap over users."
        )
    return "\n\n".join(parts)


def _warnings(tokenizers: Mapping[str, Sequence[Row]]) -> list[tuple[str, str]]:
    found = {
        (scope, text): None
        for scope, seeds in tokenizers.items()
        for metrics in seeds
        for text in metrics.get("warnings", ())
    }
    return list(found)


def _differences(row: Row) -> list[str]:
    found = row.get("difference")
    if found is None:
        return ["-", "-"]
    ndcg = found["ndcg"]
    return ["{value:+.4f} [{low:+.4f}, {high:+.4f}]".format(**ndcg), f"{ndcg['relative']:+.1%}"]


def _cell(seeds: Sequence[Row], key: str) -> str:
    values = [metrics[key] for metrics in seeds if metrics.get(key) is not None]
    if not values:
        return "-"
    mean, spread = mean_and_spread(values)
    return f"{mean:.4f} ± {spread:.4f}" if len(values) > 1 else f"{mean:.4f}"


def _markdown(lines: list[list[str]]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    ]
    return "\n".join([text[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *text[1:]])
