"""Figure 4: AUC by model."""

from __future__ import annotations

from hpgr_plugin.report.figure import PAPER, Figure, Point, draw_bars
from hpgr_plugin.report.finished import FinishedAblation, point
from hpgr_plugin.report.paper import AUC


def figure4(ablation: FinishedAblation) -> Figure:
    """Test AUC of every row that is no point of another figure, and the paper's."""
    panel, paper = "AUC by model", "in the paper, on its own log"
    rows = ablation.of_figure(None)
    points = [point(row, "auc", panel=panel, series=row["scope"], x=row["title"]) for row in rows]
    points += [Point(paper, PAPER, scope, scope, value) for scope, value in AUC.items()]
    labels = dict.fromkeys((panel, paper), ("test AUC", ""))
    return Figure("figure4", points, draw_bars, labels, ablation.settings)
