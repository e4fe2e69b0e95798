"""A small two-stage run on the synthetic log, configured as users configure theirs."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from small_task import SMALL, config_files, configure, training

__all__ = ["configure", "training"]

FILES = config_files("models/hpgr_rows")


@pytest.fixture
def small_run() -> tuple[list[str], list[str]]:
    """The files and bindings that `configure` reads."""
    return FILES, SMALL


@pytest.fixture
def command_line() -> Callable[[Path, Sequence[str]], list[str]]:
    """`command_line(output_dir, bindings)`: the flags of the same run for an entry point."""

    def build_flags(output_dir: Path, bindings: Sequence[str] = ()) -> list[str]:
        run_file = output_dir / "run.gin"
        output_dir.mkdir(parents=True, exist_ok=True)
        run_file.write_text("\n".join(f"include '{name}'" for name in FILES))
        output = f"hpgr.run.output_dir = '{output_dir}'"
        flags = [f"--gin_bindings={line}" for line in [*SMALL, output, *bindings]]
        return [f"--gin_config_file={run_file}", *flags]

    return build_flags
