"""What every figure shares: its points, the csv with settings, the png."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from hpgr_plugin.files import atomic_write

MEASURED, PAPER = "measured", "paper"


class Point(NamedTuple):
    """One number of a figure.

    Attributes:
        panel: title of its axes.
        source: "measured", or "paper" for what the paper prints.
        series: name of its line or group of bars.
        x: place on the horizontal axis, or a label.
        y: the value.
        spread: standard deviation over seeds.
    """

    panel: str
    source: str
    series: str
    x: float | str
    y: float
    spread: float = 0.0


@dataclass(frozen=True)
class Figure:
    """A figure before it is drawn.

    Attributes:
        name: of its files.
        points: in the order of the csv.
        draw: draws one panel: `(axes, its points)`.
        labels: panel -> label of the horizontal and of the vertical axis.
        settings: what the numbers come from; comment lines of the csv.
    """

    name: str
    points: Sequence[Point]
    draw: Callable[[Any, Sequence[Point]], None]
    labels: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)

    @property
    def panels(self) -> list[str]:
        """Titles of the axes, in the order of the points."""
        return list(dict.fromkeys(point.panel for point in self.points))


def write_figure(figure: Figure, directory: Path) -> list[Path]:
    """Write `name.csv`, and `name.png` where matplotlib (extra `analysis`) is installed.

    Returns:
        The files written.
    """
    table = directory / f"{figure.name}.csv"
    with atomic_write(table) as path, path.open("w", newline="") as file:
        file.writelines(f"# {name}: {value}\n" for name, value in figure.settings.items())
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Point._fields)
        writer.writerows(figure.points)
    picture = directory / f"{figure.name}.png"
    return [table, picture] if _draw(figure, picture) else [table]


def _draw(figure: Figure, path: Path) -> bool:
    try:
        from matplotlib.figure import Figure as Canvas
    except ModuleNotFoundError:
        return False
    panels = figure.panels
    canvas = Canvas(figsize=(5.5 * len(panels), 4.2), layout="constrained")
    for axes, panel in zip(canvas.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        figure.draw(axes, [point for point in figure.points if point.panel == panel])
        axes.set_title(panel, fontsize=10)
        horizontal, vertical = figure.labels.get(panel, ("", ""))
        axes.set_xlabel(horizontal)
        axes.set_ylabel(vertical)
    with atomic_write(path) as temporary:
        canvas.savefig(temporary, dpi=120, format="png")
    return True


def draw_lines(axes: Any, points: Sequence[Point]) -> None:
    """One line per series, with its spread."""
    for name, chosen in _by_series(points):
        chosen = sorted(chosen, key=lambda point: float(point.x))
        x, y = [float(point.x) for point in chosen], [point.y for point in chosen]
        axes.errorbar(x, y, yerr=[point.spread for point in chosen], marker="o", label=name)
    axes.legend(fontsize=7)


def draw_bars(axes: Any, points: Sequence[Point]) -> None:
    """A horizontal bar per point, from shortly below the smallest value."""
    names, values = [str(point.x) for point in points], [point.y for point in points]
    axes.barh(names, values, xerr=[point.spread for point in points], color="#4c72b0")
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=7)
    margin = max(max(values) - min(values), 1e-3 * max(values))
    axes.set_xlim(max(0.0, min(values) - margin), max(values) + 0.3 * margin)


def draw_bars_from_zero(axes: Any, points: Sequence[Point]) -> None:
    """As `draw_bars`, for amounts whose ratios matter."""
    draw_bars(axes, points)
    axes.set_xlim(0, 1.1 * max(point.y for point in points))


def _by_series(points: Sequence[Point]) -> Iterable[tuple[str, list[Point]]]:
    for name in dict.fromkeys(point.series for point in points):
        yield name, [point for point in points if point.series == name]
