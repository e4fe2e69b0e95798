"""The pages of examples/upstream are run line by line, as a reader runs them on a CPU."""

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from hpgr_plugin.hosts.contract import HOST_URL, KNOWN_COMMITS, host_version

pytestmark = [pytest.mark.upstream, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "examples" / "upstream"
COPIED = ("hpgr_plugin", "examples", "configs")


def shell_blocks(page: str) -> list[str]:
    """The indented blocks of a page that are commands, up to the first GPU section."""
    text = (PAGES / page).read_text().partition("\n## MovieLens")[0]
    blocks = re.findall(r"(?:^ {4}.*\n(?:\n(?= {4}))?)+", text, re.MULTILINE)
    return [textwrap.dedent(block) for block in blocks]


def run(script: str, folder: Path) -> str:
    """Run commands as one shell; everything printed. A local checkout stands in for the clone."""
    host = host_version()
    environment = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "OMP_NUM_THREADS": "1",
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.{host.root}.insteadOf",
        "GIT_CONFIG_VALUE_0": HOST_URL,
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
    }
    done = subprocess.run(
        ["bash", "-euc", script],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of what the pages use of this project, with this Python as `python`."""
    for name in COPIED:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return tmp_path


def is_quiet(output: str) -> bool:
    return "INFO:torchrec" not in output and "[TBE=" not in output


def test_ranking(project: Path) -> None:
    version = host_version()
    if version.source != "files" or version.commit != next(iter(KNOWN_COMMITS)):
        pytest.skip(f"the page checks out {next(iter(KNOWN_COMMITS))}, the host is {version}")
    if not (Path(str(version.root)) / ".git").is_dir():
        pytest.skip("the host's checkout has no .git to clone from")
    output = run("".join(shell_blocks("ranking.md")), project)
    assert (project / "tmp" / "stage1" / "handoff.safetensors").is_file()
    assert is_quiet(output)
    assert re.search(r"train - Step \d+ loss: rating \d\.\d+", output)
    gauc = re.findall(r"^metric/lifetime_gauc/rating: ([\d.]+)", output, re.MULTILINE)
    assert float(gauc[0]) > 0.6


def test_retrieval(project: Path) -> None:
    host = str(host_version().root)
    script = "".join(shell_blocks("retrieval.md"))
    output = run(script.replace("HOST", host).replace("PROJECT", str(project)), project)
    assert (project / "demo" / "tmp" / "stage1.safetensors").is_file()
    assert is_quiet(output)
    assert re.search(r"pretrain epoch \d+: loss \d", output)
    assert re.search(r"(?i)loss", output)
