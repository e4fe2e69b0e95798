"""Check that the host and its packages are there: imports, names and versions.

PYTHONPATH=path/to/generative-recommenders python -m hpgr_plugin.hosts
"""

import argparse
import sys

from hpgr_plugin.errors import HpgrError, one_line
from hpgr_plugin.hosts.environment import NO_DEPS_EXTRA, lines_of_report, requirements_of


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m hpgr_plugin.hosts", description=__doc__)
    parser.add_argument(
        "--no_deps",
        action="store_true",
        help="only print the packages that pip installs with --no-deps",
    )
    try:
        if parser.parse_args().no_deps:
            print(" ".join(requirements_of(NO_DEPS_EXTRA)))
            return
        for line in lines_of_report():
            print(line)
    except (HpgrError, ImportError) as error:
        print("error:", one_line(error), file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
