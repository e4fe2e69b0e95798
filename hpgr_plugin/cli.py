"""What the entry points share: flags, gin, and errors as one line with exit code 2."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable

import gin
from absl import app, flags
from absl import logging as absl_logging

FLAGS = flags.FLAGS

flags.DEFINE_string("gin_config_file", None, "the run's gin file")
flags.DEFINE_multi_string("gin_bindings", [], "bindings that go over those of the file")


def user_errors() -> tuple[type[Exception], ...]:
    """What a wrong config, path or file raises; anything else is a bug and keeps its traceback."""
    from hpgr_plugin.data.errors import DataError
    from hpgr_plugin.hosts.embedded.train.checkpoint import CheckpointError
    from hpgr_plugin.transfer.handoff import HandoffError

    return (ValueError, TypeError, OSError, ImportError, DataError, HandoffError, CheckpointError)


def load_configs(config_files: list[str], bindings: list[str]) -> None:
    """Parse the gin files, in order, and the bindings over them.

    Raises:
        ValueError: an unknown configurable or parameter.
        OSError: no such file.
    """
    import hpgr_plugin.config.registry  # noqa: F401  (registers every component with gin)

    gin.parse_config_files_and_bindings(config_files, bindings)


def one_line(error: Exception) -> str:
    """The message of ``error`` without line breaks, gin's own additions kept."""
    return re.sub(r"\s*\n\s*", " | ", str(error).strip())


def run_app(body: Callable[[], None]) -> None:
    """Parse the flags and the config, then run ``body``."""

    def main(argv: list[str]) -> None:
        _show_progress()
        if len(argv) > 1:
            _fail(f"unknown arguments {argv[1:]}: flags are --gin_config_file and --gin_bindings")
        if not FLAGS.gin_config_file:
            _fail("--gin_config_file is missing; for instance configs/runs/quickstart.gin")
        try:
            load_configs([FLAGS.gin_config_file], FLAGS.gin_bindings)
            body()
        except user_errors() as error:
            _fail(one_line(error))

    try:
        app.run(main)
    except flags.Error as error:
        _fail(one_line(error))


def _show_progress() -> None:
    """INFO of this package alone: what it imports has nothing to tell a user."""
    absl_logging.set_verbosity(absl_logging.WARNING)
    logger = logging.getLogger("hpgr_plugin")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def _fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
