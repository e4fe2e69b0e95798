"""What the entry points share: flags, gin, and errors as one line with exit code 2."""

from __future__ import annotations

import logging
import sys
from typing import Any

from absl import app, flags
from absl import logging as absl_logging

from hpgr_plugin.config.bindings import parse
from hpgr_plugin.config.registry import build, register
from hpgr_plugin.errors import HpgrError, one_line

FLAGS = flags.FLAGS

flags.DEFINE_string("gin_config_file", None, "gin file of the run")
flags.DEFINE_multi_string("gin_bindings", [], "bindings that override those of the file")

# What a user can cause. Anything else is a bug and keeps its traceback.
USER_ERRORS = (HpgrError, OSError, ImportError)


def load_configs(config_files: list[str], bindings: list[str]) -> None:
    """Register everything of the embedded trainer with gin and parse, see `bindings.parse`."""
    register("components", "data", "embedded")
    parse(config_files, bindings)


def run_configured(config_file: str, bindings: list[str], **overrides: Any) -> None:
    """Parse the configuration, then call `hpgr.run`.

    Args:
        config_file: path of a gin file.
        bindings: lines of gin that override those of the file.
        overrides: arguments of `hpgr.run` that replace bound ones.
    """
    load_configs([config_file], bindings)
    build("set_backends")
    build("run", **overrides)


def run_app(**overrides: Any) -> None:
    """Parse the flags and the configuration, then call `hpgr.run`.

    Args:
        overrides: arguments of `hpgr.run` that replace bound ones.
    """

    def main(argv: list[str]) -> None:
        _show_progress()
        if len(argv) > 1:
            _fail(f"unknown arguments {argv[1:]}: flags are --gin_config_file and --gin_bindings")
        if not FLAGS.gin_config_file:
            _fail("--gin_config_file is missing; for instance configs/runs/quickstart.gin")
        try:
            run_configured(FLAGS.gin_config_file, FLAGS.gin_bindings, **overrides)
        except USER_ERRORS as error:
            _fail(one_line(error))

    try:
        app.run(main)
    except flags.Error as error:
        _fail(one_line(error))


def _show_progress() -> None:
    """Show INFO messages of this package only."""
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
