"""Without the host: the adapters touch no name of it that their contract does not list."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpgr_plugin.hosts import contract
from hpgr_plugin.hosts.contract import HostContractError, HostVersion
from hpgr_plugin.hosts.requirements import DLRM_V3, HOST_PACKAGE, RESEARCH, Requirement

HOSTS = Path(contract.__file__).parent
ADAPTERS = {"dlrm_v3": DLRM_V3, "research": RESEARCH}
# Names that only a host with the project's patches has; `hpgr_plugin.hosts.seams` asks first.
SEAM_NAMES = {
    (f"{HOST_PACKAGE}.research.modeling.sequential.encoder_utils", "ENCODERS"),
}


def host_names(source: str) -> Iterator[tuple[str, str]]:
    """(module, name) for everything of the host that a file imports, or reaches through one of
    the modules it imports."""
    tree = ast.parse(source)
    modules: dict[str, str] = {}
    imported: list[tuple[str, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == HOST_PACKAGE:
            for alias in node.names:
                imported.append((str(node.module), alias.name))
                modules[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        if isinstance(node, ast.Import):
            for alias in node.names:
                assert alias.name.split(".")[0] != HOST_PACKAGE, "use from ... import"
    reached: set[tuple[str, str]] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.attr.startswith("__"):
                continue
            module = modules.get(node.value.id)
            if module is not None:
                reached.add((module, node.attr))
    used_as_module = {module for module, _ in reached}
    yield from reached
    for module, name in imported:
        if f"{module}.{name}" not in used_as_module:
            yield module, name


def sources(adapter: str) -> list[str]:
    return [file.read_text() for file in sorted((HOSTS / adapter).glob("*.py"))]


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapters_touch_only_listed_names(adapter: str) -> None:
    used = {use for source in sources(adapter) for use in host_names(source)}
    assert used, f"{adapter} touches nothing of the host?"
    known = {(r.module, r.name) for r in ADAPTERS[adapter]} | SEAM_NAMES
    unlisted = [use for use in sorted(used) if not _is_listed(known, *use)]
    assert unlisted == []


def _is_listed(known: set[tuple[str, str]], module: str, name: str) -> bool:
    # A name reached through an imported class, such as an enumeration's member: listed is
    # either that ("module", "Class.name") or the class.
    owner, _, inner = module.rpartition(".")
    return not known.isdisjoint({(module, name), (owner, f"{inner}.{name}"), (owner, inner)})


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_no_requirement_is_listed_twice(adapter: str) -> None:
    names = [(r.module, r.name) for r in ADAPTERS[adapter]]
    assert len(names) == len(set(names))


def test_the_scan_finds_imports_and_what_is_reached_through_modules() -> None:
    source = (
        f"from {HOST_PACKAGE}.a import b, C\nfrom {HOST_PACKAGE} import d as e\nb.x(C)\ne.f.g\n"
    )
    assert set(host_names(source)) == {
        (f"{HOST_PACKAGE}.a.b", "x"),
        (f"{HOST_PACKAGE}.a", "C"),
        (f"{HOST_PACKAGE}.d", "f"),
    }


def test_requirements_are_checked_against_any_module() -> None:
    module = "hpgr_plugin.hosts.contract"
    fine = (
        Requirement(module, "check", ("requirements",)),
        Requirement(module, "HostContractError", ("message", "problems")),
        Requirement(module, "HostVersion.root"),
        Requirement(module, "HOST_URL"),
    )
    assert contract.check(fine) == []
    problems = contract.check([Requirement(module, "check", ("a", "requirements", "c"))])
    assert problems == [f"{module}.check: takes no parameter a, c"]


def test_an_absent_host_is_said_in_one_line_with_where_to_get_it() -> None:
    code = "import sys; sys.modules['generative_recommenders'] = None\nimport hpgr_plugin.hosts.{}"
    for adapter in ADAPTERS:
        done = subprocess.run(
            [sys.executable, "-c", code.format(adapter)], capture_output=True, text=True
        )
        assert done.returncode != 0
        last = done.stderr.strip().splitlines()[-1]
        assert HostContractError.__name__ in last
        assert "git clone" in last
        assert next(iter(contract.KNOWN_COMMITS)) in last


@pytest.fixture
def other_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package of the host's name that is not the host, in a git repository of its own."""
    package = tmp_path / HOST_PACKAGE
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "common.py").write_text("import pkg_that_is_not_there.part\n")
    (package / "moved.py").write_text(f"import {HOST_PACKAGE}.gone\n")
    loaded = {n: m for n, m in sys.modules.items() if n.split(".")[0] == HOST_PACKAGE}
    for name in loaded:
        del sys.modules[name]
    monkeypatch.syspath_prepend(str(tmp_path))
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "another commit")
    yield tmp_path
    for name in [n for n in sys.modules if n.split(".")[0] == HOST_PACKAGE]:
        del sys.modules[name]
    sys.modules.update(loaded)


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=test", "-c", "user.email=test@example.org")
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_another_commit_is_told_from_edited_files(other_host: Path) -> None:
    head = git(other_host, "rev-parse", "--short=7", "HEAD")
    assert contract.host_version() == HostVersion(other_host, head, "git")
    assert str(contract.host_version()) == f"another commit, {head}, at {other_host}"
    (other_host / HOST_PACKAGE / "common.py").write_text("")
    assert contract.host_version() == HostVersion(other_host, head, "edited")
    assert "with edited files" in str(contract.host_version())


@pytest.mark.usefixtures("other_host")
def test_a_missing_package_is_told_from_a_moved_name() -> None:
    with pytest.raises(HostContractError) as raised:
        contract.require("adapter", [Requirement(f"{HOST_PACKAGE}.common", "HammerModule")])
    message = str(raised.value)
    assert "\n" not in message
    assert "not installed: " in message
    assert "pkg_that_is_not_there" in message
    assert "pip install" in message
    with pytest.raises(HostContractError, match="moved: does not import") as raised:
        contract.require("adapter", [Requirement(f"{HOST_PACKAGE}.moved", "Anything")])
    assert raised.value.problems
    assert "another commit" in str(raised.value)
