"""Which packages an import of this package loads."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

BROUGHT = """
import sys
import torch, gin
before = {name.partition(".")[0] for name in sys.modules}
import {modules}
after = {name.partition(".")[0] for name in sys.modules}
print(*sorted(after - before - set(sys.stdlib_module_names)))
"""


@pytest.mark.parametrize(
    "modules",
    [
        "hpgr_plugin",
        "hpgr_plugin.ops.jagged, hpgr_plugin.components.positions, hpgr_plugin.ops.preference_plan",
    ],
)
def test_import_takes_torch_and_gin_only(modules):
    done = subprocess.run(
        [sys.executable, "-c", BROUGHT.replace("{modules}", modules)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["hpgr_plugin"]
