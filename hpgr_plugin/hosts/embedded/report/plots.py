"""Plots of an ablation: AUC by model, and validation AUC over the steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hpgr_plugin.files import atomic_write
from hpgr_plugin.hosts.embedded.report.table import Row, mean_and_spread


def plot_ablation(rows: Sequence[Row], path: Path) -> bool:
    """Draw the rows of `markdown_table` into a PNG.

    Args:
        rows: see `markdown_table`.
        path: of the PNG.

    Returns:
        False if matplotlib (extra `analysis`) is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return False
    figure = Figure(figsize=(11, 0.45 * len(rows) + 2), layout="constrained")
    bars, curves = figure.subplots(1, 2)
    titles = [row["title"] for row in rows]
    stats = [mean_and_spread([metrics["auc"] for metrics in row["seeds"]]) for row in rows]
    means, spreads = [mean for mean, _ in stats], [spread for _, spread in stats]
    bars.barh(titles, means, xerr=spreads, color="#4c72b0")
    bars.invert_yaxis()
    bars.set_xlim(min(means) - 0.02, max(means) + 0.01)
    bars.set_xlabel("test AUC (mean, standard deviation over seeds)")
    for row in rows:
        history = row["seeds"][0].get("history")
        if history:
            steps = [point["step"] for point in history]
            curves.plot(steps, [point["auc"] for point in history], marker=".", label=row["title"])
    curves.set_xlabel("step")
    curves.set_ylabel("validation AUC")
    curves.legend(fontsize=7)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    return True
