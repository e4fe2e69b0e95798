"""Without the host: the adapters touch no name of it that their contract does not list."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpgr_plugin.hosts import contract
from hpgr_plugin.hosts.contract import HOST_PACKAGE, HostContractError, Requirement
from hpgr_plugin.hosts.dlrm_v3_requirements import REQUIREMENTS as RANKING
from hpgr_plugin.hosts.research_requirements import REQUIREMENTS as RETRIEVAL

HOSTS = Path(contract.__file__).parent
ADAPTERS = {"dlrm_v3": RANKING, "research": RETRIEVAL}
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


def private_names(trees: list[ast.Module]) -> set[str]:
    """`x._name` of an adapter where it defines no `_name` itself: then it is the host's."""
    used: set[str] = set()
    own: set[str] = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
            (own if isinstance(node.ctx, ast.Store) else used).add(node.attr)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            own.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            own.add(node.id)
    return {name for name in used - own if not name.startswith("__")}


def sources(adapter: str) -> list[str]:
    return [file.read_text() for file in sorted((HOSTS / adapter).glob("*.py"))]


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapters_touch_listed_names_alone(adapter: str) -> None:
    used = {use for source in sources(adapter) for use in host_names(source)}
    assert used, f"{adapter} touches nothing of the host?"
    known = {(r.module, r.name) for r in ADAPTERS[adapter]} | SEAM_NAMES
    unlisted = [use for use in sorted(used) if not _is_listed(known, *use)]
    assert unlisted == []


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapters_touch_listed_private_attributes_alone(adapter: str) -> None:
    used = private_names([ast.parse(source) for source in sources(adapter)])
    known = {r.name.rpartition(".")[2] for r in ADAPTERS[adapter]}
    assert sorted(used - known) == []


def _is_listed(known: set[tuple[str, str]], module: str, name: str) -> bool:
    # A name reached through an imported class, such as an enumeration's member: listed is
    # either that ("module", "Class.name") or the class.
    owner, _, inner = module.rpartition(".")
    return not known.isdisjoint({(module, name), (owner, f"{inner}.{name}"), (owner, inner)})


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_no_requirement_is_listed_twice(adapter: str) -> None:
    names = [(r.module, r.name, r.kind) for r in ADAPTERS[adapter]]
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


def test_requirements_are_validated() -> None:
    with pytest.raises(ValueError, match="kind"):
        Requirement("a", "b", "thing")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="parameters"):
        Requirement("a", "b", "value", ("c",))
    with pytest.raises(ValueError, match=r"Class\.attribute"):
        Requirement("a", "b", "field")


def test_requirements_are_checked_against_any_module() -> None:
    module = "hpgr_plugin.hosts.contract"
    fine = (
        Requirement(module, "check", "function", ("requirements",)),
        Requirement(module, "HostContractError", "class", ("message", "problems|none_of_that")),
        Requirement(module, "HostContractError.problems", "field"),
        Requirement(module, "HOST_PACKAGE", "value"),
    )
    assert contract.check(fine) == []
    problems = contract.check(
        [Requirement(module, "check", "function", ("a|b", "requirements", "c"))]
    )
    assert problems == [f"{module}.check: takes no parameter a|b, c"]


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
