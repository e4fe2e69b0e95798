"""python -m hpgr_plugin.patches check|apply|revert HOST."""

import argparse
import sys
from pathlib import Path

from hpgr_plugin.patches.checkout import PatchError, State, apply, check, revert
from hpgr_plugin.patches.series import HOST_COMMIT, SERIES_FOLDER, Series, load_series


def main(arguments: list[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 0, or 1 after printing why the command was refused.
    """
    parser = argparse.ArgumentParser(prog="python -m hpgr_plugin.patches", description=__doc__)
    parser.add_argument("command", choices=("check", "apply", "revert"))
    parser.add_argument("host", type=Path, help="top folder of the host's checkout")
    parser.add_argument(
        "--series",
        type=Path,
        default=SERIES_FOLDER,
        help="folder of the numbered patches (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    try:
        print(_run(options.command, options.host, load_series(options.series)))
    except (PatchError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _run(command: str, host: Path, series: Series) -> str:
    if command == "apply":
        apply(host, series)
        return f"applied to {host}"
    if command == "revert":
        revert(host, series)
        return f"reverted in {host}"
    if check(host, series) is State.APPLIED:
        return f"{host}: {HOST_COMMIT} with the series applied"
    return f"{host}: {HOST_COMMIT}, the series can be applied"


if __name__ == "__main__":
    sys.exit(main())
