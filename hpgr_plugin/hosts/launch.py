"""What the launchers of the upstream hosts share: flags, gin, workers and one-line errors."""

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from torch import distributed as dist
from torch import multiprocessing
from torch.multiprocessing.spawn import ProcessExitedException

from hpgr_plugin.config.bindings import check_unused, parse
from hpgr_plugin.config.registry import build, shipped
from hpgr_plugin.errors import HpgrError, one_line

# What a missing file or an unfit slot raises at any time, and what wrong bindings raise besides
# while a configuration is read and its objects are built.
USER_ERRORS = (HpgrError, OSError)
CONFIGURATION_ERRORS = (*USER_ERRORS, ValueError, TypeError, SyntaxError, ImportError, RuntimeError)

_EXIT_CODE = 2


def argument_parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """A parser of `python -m MODULE` with the flags that every launcher has."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.add_argument("--gin_config_file", required=True, type=_existing_file, metavar="FILE")
    parser.add_argument(
        "--gin_bindings",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="overrides one line of the file; may be repeated",
    )
    parser.add_argument(
        "--allow_unused",
        action="append",
        default=[],
        metavar="NAME",
        help="a component whose bindings may stay unread, as those of an emptied slot do",
    )
    return parser


class Configuration(NamedTuple):
    """What the flags say about gin.

    Attributes:
        file: The .gin file.
        bindings: Lines that override those of the file.
        allow_unused: Names, without `hpgr.`, whose bindings may stay unread.
    """

    file: str
    bindings: tuple[str, ...] = ()
    allow_unused: tuple[str, ...] = ()

    @classmethod
    def of(cls, options: argparse.Namespace) -> "Configuration":
        """The configuration in parsed flags."""
        return cls(
            options.gin_config_file, tuple(options.gin_bindings), tuple(options.allow_unused)
        )


def read_config(configuration: Configuration, attach: Callable[[], None]) -> None:
    """Parse the configuration, attach, and show INFO messages, such as the host's metrics."""
    parse([configuration.file], list(configuration.bindings))
    check_unused(configuration.allow_unused)
    build("set_backends")
    attach()
    # Importing fbgemm raises the root logger's level to WARNING.
    logging.basicConfig(level=logging.INFO, force=True)
    for handler in logging.getLogger().handlers:
        handler.addFilter(_not_of_tables)


@contextlib.contextmanager
def one_line_errors(errors: tuple[type[Exception], ...]) -> Iterator[None]:
    """Turn `errors` into one line on stderr and exit code 2; others keep their traceback."""
    try:
        yield
    except errors as error:
        print("error:", one_line(error), file=sys.stderr)
        sys.exit(_EXIT_CODE)


def start_workers(worker: Callable[..., None], count: int, *args: Any) -> None:
    """Run `worker(rank, count, *args)` in `count` processes; exit as the first that fails does."""
    try:
        multiprocessing.start_processes(
            worker, args=(count, *args), nprocs=count, start_method="spawn"
        )
    except ProcessExitedException as error:
        sys.exit(error.exit_code)


def start_gloo(rank: int, world_size: int, master_port: int) -> None:
    """Join the process group of a run on CPUs; its processes are on this machine."""
    os.environ["MASTER_ADDR"] = "localhost"
    os.environ["MASTER_PORT"] = str(master_port)
    dist.init_process_group("gloo", rank=rank, world_size=world_size)


def _not_of_tables(record: logging.LogRecord) -> bool:
    """Leaves out what torchrec and fbgemm say about every table and way of sharding it."""
    of_tables = any(f"/{package}/" in record.pathname for package in ("torchrec", "fbgemm_gpu"))
    return record.levelno >= logging.WARNING or not of_tables


def _existing_file(path: str) -> str:
    """An absolute path, also of a shipped file such as "configs/upstream/ranking_synthetic.gin"."""
    found = [place for place in (Path(path), shipped(path)) if place.is_file()]
    if not found:
        raise argparse.ArgumentTypeError(f"no file {path}")
    return str(found[0].resolve())
