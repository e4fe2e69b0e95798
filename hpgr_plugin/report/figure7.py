"""Figure 7: AUC over the length of the history, and over depth and width."""

from __future__ import annotations

from hpgr_plugin.report.figure import PAPER, Figure, Point, draw_lines
from hpgr_plugin.report.finished import FinishedAblation
from hpgr_plugin.report.paper import DEPTH, HISTORY


def figure7(ablation: FinishedAblation) -> Figure:
    """Test AUC of the rows `figure7_history` and `figure7_depth`, and the paper's."""
    history, depth = "AUC over history length", "AUC over depth, by width"
    points = [
        *ablation.points("figure7_history", history),
        *ablation.points("figure7_depth", depth),
        *(Point(f"paper: {history}", PAPER, "HPGR", x, y) for x, y in HISTORY.items()),
    ]
    for width, values in DEPTH.items():
        points += [Point(f"paper: {depth}", PAPER, width, x, y) for x, y in values.items()]
    labels = {history: ("longest history", "test AUC"), depth: ("layers", "test AUC")}
    labels |= {f"paper: {panel}": label for panel, label in labels.items()}
    return Figure("figure7", points, draw_lines, labels, ablation.settings)
