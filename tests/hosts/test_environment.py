"""What `make host` installs and checks, without the host."""

import configparser
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hpgr_plugin.errors import HpgrError
from hpgr_plugin.hosts import contract, environment
from hpgr_plugin.hosts.environment import requirements_of

ROOT = Path(__file__).parents[2]


def extras() -> dict[str, list[str]]:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    section = parser["options.extras_require"]
    return {name: [line for line in text.split("\n") if line] for name, text in section.items()}


def test_a_package_is_pinned_to_one_version() -> None:
    pins: dict[str, set[str]] = {}
    for lines in extras().values():
        for line in lines:
            name, pinned, version = line.partition(";")[0].strip().partition("==")
            if pinned:
                pins.setdefault(name, set()).add(version)
    assert {name: versions for name, versions in pins.items() if len(versions) > 1} == {}
    assert {"torchrec", "torchmetrics", "triton"} <= pins.keys()


def test_the_extras_of_the_host_hold_what_the_contract_names() -> None:
    names = {
        re.split(r"[=><;]", line)[0].strip()
        for extra in ("cpu", "data", "train", "host", "host-no-deps")
        for line in extras()[extra]
    }
    assert set(contract.PIP_NAMES.values()) <= names


def test_requirements_are_those_of_one_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = [
        "numpy>=1.26",
        'torchmetrics==1.0.3; extra == "host"',
        'triton==3.7.1; platform_system == "Linux" and extra == "host"',
        'torchrec==1.9.0; extra == "host-no-deps"',
        'torchrec==1.9.0; extra == "host-cuda"',
    ]
    monkeypatch.setattr(environment.importlib.metadata, "requires", lambda name: metadata)
    assert requirements_of("host") == ["torchmetrics==1.0.3", "triton==3.7.1"]
    assert requirements_of("host-no-deps") == ["torchrec==1.9.0"]


def test_versions_that_differ_from_the_pins_are_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_version", {"torchmetrics": "1.9.0", "x": "2+cpu"}.get)
    line = environment._version_line
    assert line("torchmetrics", "1.0.3") == "torchmetrics 1.9.0 (setup.cfg pins 1.0.3)"
    assert line("x", "2") == "x 2+cpu"
    assert line("x", None) == "x 2+cpu"
    assert line("gone", None) == "gone: version unknown"


def test_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def requires(name: str) -> list[str]:
        raise environment.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(environment.importlib.metadata, "requires", requires)
    with pytest.raises(HpgrError, match="is not installed: pip install"):
        requirements_of("host")


def test_without_a_host_the_command_is_one_line() -> None:
    code = "import sys; sys.modules['generative_recommenders'] = None; "
    code += "sys.argv = ['hosts']; from hpgr_plugin.hosts.__main__ import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "git clone" in done.stderr
