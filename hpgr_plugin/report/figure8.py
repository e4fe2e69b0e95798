"""Figure 8: time per step in training and in inference."""

from __future__ import annotations

from hpgr_plugin.report.figure import PAPER, Figure, Point, draw_bars_from_zero
from hpgr_plugin.report.finished import FinishedAblation, point
from hpgr_plugin.report.paper import STEP

METRICS = {"training": "seconds_per_step", "inference": "inference_seconds_per_step"}


def figure8(ablation: FinishedAblation) -> Figure:
    """Seconds per batch of every row that is no point of another figure, and the paper's."""
    points = []
    for panel, metric in METRICS.items():
        for row in ablation.of_figure(None):
            points.append(point(row, metric, panel=panel, series=row["scope"], x=row["title"]))
        title = f"paper: {panel}"
        points += [Point(title, PAPER, name, name, value) for name, value in STEP[panel].items()]
    labels = {entry.panel: ("seconds per step", "") for entry in points}
    return Figure("figure8", points, draw_bars_from_zero, labels, ablation.settings)
