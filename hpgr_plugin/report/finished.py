"""Reading results.json of a finished ablation."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpgr_plugin.errors import HpgrError
from hpgr_plugin.hosts.embedded.report.table import mean_and_spread
from hpgr_plugin.report.figure import MEASURED, Point


@dataclass(frozen=True)
class FinishedAblation:
    """What an ablation wrote.

    Attributes:
        path: of its results.json.
        rows: of its table, see `run_ablation`.
        settings: command, device, seeds and versions.
        config: the gin configuration in force.
    """

    path: Path
    rows: Sequence[dict[str, Any]]
    settings: dict[str, str]
    config: str

    @classmethod
    def read(cls, folder: Path) -> FinishedAblation:
        """The ablation in a folder.

        Raises:
            HpgrError: the folder holds none.
        """
        with results_of(folder, "ablation") as (path, content):
            rows, environment = content["metrics"]["rows"], content["environment"]
            settings = {
                "results": str(path),
                "command": environment["command"],
                "device": environment["device"],
                "seeds": str(content["seeds"]),
                "versions": json.dumps(environment["versions"]),
            }
            return cls(path, rows, settings, content["operative_config"])

    def of_figure(self, figure: str | None) -> list[dict[str, Any]]:
        """Trained rows that are points of a figure, or with None of no figure.

        Raises:
            HpgrError: there are none.
        """
        rows = [
            row for row in self.rows if row["scope"] != "item_mean" and row.get("figure") == figure
        ]
        if not rows:
            wanted = "rows" if figure is None else f"rows with hpgr.AblationRow.figure = {figure!r}"
            raise HpgrError(f"{self.path} has no {wanted}")
        return rows

    def points(self, figure: str, panel: str, metric: str = "auc") -> list[Point]:
        """The rows of a figure as points of its lines."""
        return [
            point(row, metric, panel=panel, series=row["series"], x=row["x"])
            for row in self.of_figure(figure)
        ]


@contextmanager
def results_of(folder: Path, kind: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The results.json of a folder and its content, to be read inside.

    Args:
        folder: `hpgr.run.output_dir` of the run.
        kind: of run, for messages.

    Raises:
        HpgrError: there is none, or it does not hold what is read inside.
    """
    path = folder / "results.json"
    if not path.is_file():
        raise HpgrError(f"--results takes the folder of a finished {kind}: no {path}")
    try:
        yield path, json.loads(path.read_text())
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise HpgrError(f"{path} is not of a finished {kind}: {error!r}") from error


def point(row: dict[str, Any], metric: str, *, panel: str, series: str, x: float | str) -> Point:
    """A row's metric, mean and standard deviation over its seeds, as a measured point.

    Raises:
        HpgrError: the row has no such metric.
    """
    try:
        mean, spread = mean_and_spread([seed[metric] for seed in row["seeds"]])
    except (KeyError, ValueError) as error:
        raise HpgrError(f"row {row['scope']!r} has no {metric} in every seed") from error
    return Point(panel, MEASURED, series, x, mean, spread)
