"""What an adapter relies on in its host, written down as data and checked when it attaches.

A host adapter subclasses and calls code of a project that moves. Each adapter lists every name
it touches as a `Requirement`; `require` looks all of them up, and when the host has moved it
says exactly what is missing and which commits of the host are known to work. Nothing here
imports a host before `check` is called.
"""

import hashlib
import importlib
import importlib.util
import inspect
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

HOST_PACKAGE = "generative_recommenders"
HOST_URL = "https://github.com/meta-recsys/generative-recommenders"

# The commits every adapter is tested on, newest first, each with the blob ids (as git computes
# them) of files of the package that tell it apart: a copy without .git is recognised too.
KNOWN_COMMITS: dict[str, dict[str, str]] = {
    "db1bf8f": {
        "modules/dlrm_hstu.py": "7f841067e2f5081c6e3d0f2c3218ab6363cbc793",
        "modules/stu.py": "6120fde0f6aebf065ec79d7dedc06ac9f211f7a4",
        "ops/hstu_compute.py": "7e2d1a7aa26784243c80e49cbbd557035234e3d9",
        "dlrm_v3/train/utils.py": "1c5a898f8c0a39a805e5ea6498126d4a46566415",
        "research/trainer/train.py": "26d5a9d841680593e3490bb9d625cd4030bebc93",
    },
    "f1c2b72": {
        "modules/dlrm_hstu.py": "003abe77dd42ad867fe9794f39ab3eb186c5a87c",
        "modules/stu.py": "d186000e38415f5e55a62161ed4f34b3ca3e6be2",
        "ops/hstu_compute.py": "909a3582fe16ae61bc68ca0b05c919211a2708ff",
        "dlrm_v3/train/utils.py": "a59b91e59ff07bffa2f57316eda1bc6259993fa3",
        "research/trainer/train.py": "4d6e8c829bd912057d866bed8e4919b3fa849df7",
    },
}

Kind = Literal["class", "function", "value", "field"]


@dataclass(frozen=True)
class Requirement:
    """One name of the host that an adapter uses.

    Args:
        module: dotted module path, such as "generative_recommenders.modules.stu".
        name: a name in it; a dot reaches into a class ("STULayer.forward").
        kind: "class" and "function" are callables whose `parameters` are looked up (a class:
            those of its constructor); "value" is any other module attribute; "field" is an
            attribute that the class's constructor sets on the instance ("STULayer._num_heads").
        parameters: parameter names it must take; "a|b" means either.
    """

    module: str
    name: str
    kind: Kind
    parameters: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {get_args(Kind)}, got {self.kind!r}")
        if self.parameters and self.kind not in ("class", "function"):
            raise ValueError(f"parameters belong to a class or function, not to a {self.kind}")
        if self.kind == "field" and "." not in self.name:
            raise ValueError(f"a field is named Class.attribute, got {self.name!r}")


class HostContractError(ImportError):
    """The host is absent, or is not the one an adapter was written for.

    Attributes:
        problems: one line for every requirement that is not met.
    """

    def __init__(self, message: str, problems: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.problems = problems


@dataclass(frozen=True)
class HostVersion:
    """What can be known of the host on the path.

    Attributes:
        root: the checkout's top folder, None if the host is absent or has no files.
        commit: short commit id, None if it cannot be told.
        source: "files" (blob ids of a known commit), "git" (HEAD of the checkout; its files
            may be edited, by the project's own patch series for one) or "unknown".
    """

    root: Path | None
    commit: str | None
    source: Literal["files", "git", "unknown"]

    def __str__(self) -> str:
        if self.commit is None:
            return f"version unknown, at {self.root}"
        edited = "" if self.source == "files" else ", files differ from that commit"
        return f"commit {self.commit}{edited}, at {self.root}"


def check(requirements: Iterable[Requirement]) -> list[str]:
    """Look every requirement up in the host.

    Returns:
        One line for each requirement not met, naming what is missing; empty if all hold.
    """
    problems: list[str] = []
    unimportable: set[str] = set()
    for requirement in requirements:
        if requirement.module in unimportable:
            continue
        try:
            module = importlib.import_module(requirement.module)
        except Exception as error:  # a host module may die of anything at import
            unimportable.add(requirement.module)
            problems.append(
                f"{requirement.module}: does not import ({type(error).__name__}: {error})"
            )
            continue
        problem = _problem(requirement, module)
        if problem is not None:
            problems.append(f"{requirement.module}.{requirement.name}: {problem}")
    return problems


def require(adapter: str, requirements: Iterable[Requirement]) -> None:
    """Check `requirements` and stop with everything that is missing.

    Raises:
        HostContractError: the host is not importable, or some requirement is not met.
    """
    if importlib.util.find_spec(HOST_PACKAGE) is None:
        raise HostContractError(f"{adapter}: no {HOST_PACKAGE} on the path. {how_to_get_host()}")
    problems = check(requirements)
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise HostContractError(
            f"{adapter}: the host ({host_version()}) lacks what this adapter relies on:\n"
            f"{listed}\nKnown to work: commits {', '.join(KNOWN_COMMITS)} of {HOST_URL}",
            tuple(problems),
        )


def how_to_get_host() -> str:
    """One line: how to put the host on the path."""
    return (
        f"The host is not on a package registry: git clone {HOST_URL}, "
        f"check out {next(iter(KNOWN_COMMITS))} and add the folder to PYTHONPATH"
    )


def host_version() -> HostVersion:
    """Tell the host's commit from its files, else from its git checkout, else not at all."""
    root = _host_root()
    if root is None:
        return HostVersion(None, None, "unknown")
    for commit, blobs in KNOWN_COMMITS.items():
        if all(_blob_id(root / HOST_PACKAGE / path) == blob for path, blob in blobs.items()):
            return HostVersion(root, commit, "files")
    commit_of_head = _git_head(root)
    if commit_of_head is None:
        return HostVersion(root, None, "unknown")
    return HostVersion(root, commit_of_head, "git")


def accepts(function: Callable[..., Any], parameter: str) -> bool:
    """Whether `function` takes `parameter` by name (gin's wrapper and **kwargs looked through)."""
    return parameter in inspect.signature(function).parameters


def _problem(requirement: Requirement, module: Any) -> str | None:
    """Why `requirement` does not hold in the imported `module`, or None."""
    if requirement.kind == "field":
        return _field_problem(requirement, module)
    found = _lookup(module, requirement.name)
    if found is None:
        return "not there"
    if requirement.kind == "class" and not inspect.isclass(found):
        return f"is a {type(found).__name__}, not a class"
    if requirement.kind == "function" and not callable(found):
        return f"is a {type(found).__name__}, not a function"
    missing = [
        choice
        for choice in requirement.parameters
        if not any(accepts(found, name) for name in choice.split("|"))
    ]
    if missing:
        return f"takes no parameter {', '.join(missing)}"
    return None


def _field_problem(requirement: Requirement, module: Any) -> str | None:
    owner_name, _, field = requirement.name.rpartition(".")
    owner = _lookup(module, owner_name)
    if not inspect.isclass(owner):
        return f"there is no class {owner_name}"
    # Attributes that a constructor sets exist only on instances; their names are in its code.
    for base in owner.__mro__:
        if field in base.__dict__:
            return None
        constructor = base.__dict__.get("__init__")
        code = getattr(inspect.unwrap(constructor), "__code__", None) if constructor else None
        if code is not None and field in code.co_names:
            return None
    return f"{owner_name}'s constructor sets no {field}"


def _lookup(module: Any, dotted: str) -> Any:
    found = module
    for part in dotted.split("."):
        found = getattr(found, part, None)
    return found


def _host_root() -> Path | None:
    spec = importlib.util.find_spec(HOST_PACKAGE)
    if spec is None:
        return None
    places = [spec.origin] if spec.origin else list(spec.submodule_search_locations or [])
    if not places:
        return None
    place = Path(places[0])
    return (place.parent if spec.origin else place).parent


def _blob_id(path: Path) -> str | None:
    """The id git gives a file's content, None if there is no such file."""
    if not path.is_file():
        return None
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _git_head(root: Path) -> str | None:
    """Short id of HEAD if `root` is the top of a git checkout (not a folder inside another)."""
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "rev-parse", "--short=7", "HEAD"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()
