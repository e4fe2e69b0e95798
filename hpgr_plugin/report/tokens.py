"""AUC over kept tokens: PGSA beside the most recent items, at equal tokens."""

from __future__ import annotations

from hpgr_plugin.hosts.embedded.report.table import mean_and_spread
from hpgr_plugin.report.figure import Figure, draw_lines
from hpgr_plugin.report.finished import FinishedAblation, point


def tokens(ablation: FinishedAblation) -> Figure:
    """Test AUC and GAUC of the rows of this figure, each at the share of tokens that it keeps."""
    panels = {"AUC over kept tokens": "auc", "GAUC over kept tokens": "gauc"}
    points = []
    for panel, metric in panels.items():
        for row in ablation.of_figure("tokens"):
            kept, _ = mean_and_spread([seed["kept_tokens"] for seed in row["seeds"]])
            points.append(point(row, metric, panel=panel, series=row["series"], x=kept))
    labels = {
        panel: ("share of visible history tokens kept", f"test {metric.upper()}")
        for panel, metric in panels.items()
    }
    return Figure("tokens", points, draw_lines, labels, ablation.settings)
