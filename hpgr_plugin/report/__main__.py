"""python -m hpgr_plugin.report figure4 --results results/ml-1m_ablation."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from hpgr_plugin.cli import USER_ERRORS
from hpgr_plugin.errors import one_line
from hpgr_plugin.files import atomic_write
from hpgr_plugin.report.figure import Figure, write_figure
from hpgr_plugin.report.figure4 import figure4
from hpgr_plugin.report.figure5 import figure5
from hpgr_plugin.report.figure6 import figure6
from hpgr_plugin.report.figure7 import figure7
from hpgr_plugin.report.figure8 import figure8
from hpgr_plugin.report.finished import FinishedAblation
from hpgr_plugin.report.slates import slates
from hpgr_plugin.report.tokens import tokens

FROM_RESULTS: dict[str, Callable[[FinishedAblation], Figure]] = {
    "figure4": figure4,
    "figure6": figure6,
    "figure7": figure7,
    "figure8": figure8,
    "tokens": tokens,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write one figure; 2 after a mistake of the user, said in one line."""
    chosen = _parser().parse_args(arguments)
    try:
        if chosen.figure == "slates":
            print("wrote", *slates(chosen.results, chosen.out))
            return 0
        if chosen.figure == "figure5":
            figure = figure5(chosen.handoff, chosen.before)
        else:
            ablation = FinishedAblation.read(chosen.results)
            figure = FROM_RESULTS[chosen.figure](ablation)
            with atomic_write(chosen.out / f"{figure.name}.gin") as path:
                path.write_text(ablation.config)
        written = write_figure(figure, chosen.out)
    except USER_ERRORS as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    print("wrote", *written)
    if len(written) == 1:
        print("No png: matplotlib is not installed (extra 'analysis').")
    if "map" in figure.settings:
        print(f"The map is drawn by {figure.settings['map']}.")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m hpgr_plugin.report", description=__doc__)
    figures = parser.add_subparsers(dest="figure", required=True)
    for name, function in FROM_RESULTS.items():
        command = figures.add_parser(name, help=(function.__doc__ or "").splitlines()[0])
        command.add_argument("--results", type=Path, required=True, help="folder of an ablation")
        _add_out(command)
    command = figures.add_parser("slates", help=(slates.__doc__ or "").splitlines()[0])
    command.add_argument("--results", type=Path, required=True, help="folder of a slate ablation")
    _add_out(command)
    command = figures.add_parser("figure5", help=(figure5.__doc__ or "").splitlines()[0])
    command.add_argument("--handoff", type=Path, required=True, help="hand-over of stage 1")
    command.add_argument("--before", type=Path, help="checkpoint of a ranker without stage 1")
    _add_out(command)
    return parser


def _add_out(command: argparse.ArgumentParser) -> None:
    command.add_argument("--out", type=Path, default=Path("results/figures"), help="folder")


if __name__ == "__main__":
    sys.exit(main())
