"""Figure 6: AUC over K, the number of anchors."""

from __future__ import annotations

from hpgr_plugin.report.figure import PAPER, Figure, Point, draw_lines
from hpgr_plugin.report.finished import FinishedAblation
from hpgr_plugin.report.paper import TOP_K


def figure6(ablation: FinishedAblation) -> Figure:
    """Test AUC of the rows of figure 6, and the paper's."""
    panel, paper = "AUC over K", "in the paper, on its own log"
    points = ablation.points("figure6", panel)
    points += [Point(paper, PAPER, "HPGR", k, value) for k, value in TOP_K.items()]
    labels = dict.fromkeys((panel, paper), ("K", "test AUC"))
    return Figure("figure6", points, draw_lines, labels, ablation.settings)
