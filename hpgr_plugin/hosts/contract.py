"""Checks the host when an adapter attaches: its commit, its imports and its signatures.

An adapter subclasses and calls code of a project that moves. `requirements.py` lists, per adapter,
the names it imports and the parameters it passes. `require` imports them all and, if the host has
moved or a package is missing, stops with everything that is wrong and the commits that are tested.
"""

import importlib.util
import inspect
import pkgutil
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from hpgr_plugin.errors import HpgrError
from hpgr_plugin.hosts.requirements import HOST_PACKAGE, Requirement
from hpgr_plugin.patches.checkout import blob_id

HOST_URL = "https://github.com/meta-recsys/generative-recommenders"

# The tested commits, newest first, each with the git blob ids of the files that tell it from
# others, so that a copy without .git is recognised too.
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

# Packages that the host imports, and what to give to pip for each.
PIP_NAMES = {
    "fbgemm_gpu": "fbgemm-gpu-cpu",
    "torchrec": "torchrec",
    "triton": "triton",
    "tensordict": "tensordict",
    "pyre_extensions": "pyre-extensions",
    "torchmetrics": "torchmetrics",
    "pandas": "pandas",
    "tensorboard": "tensorboard",
}


class HostContractError(HpgrError, ImportError):
    """The host or one of its packages is missing, or the host lacks a name the adapter uses.

    Attributes:
        problems: One line for every requirement that is not met.
    """

    def __init__(self, message: str, problems: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.problems = problems


class HostVersion(NamedTuple):
    """What is known about the host on the path.

    Attributes:
        root: The checkout's top folder, None if there is no host.
        commit: Short commit id, None if it cannot be told.
        source: "files" if the files are those of a tested commit, "git" if the commit is HEAD of
            an unedited checkout, "edited" if files differ from HEAD (the patch series edits some),
            "unknown" otherwise.
    """

    root: Path | None
    commit: str | None
    source: Literal["files", "git", "edited", "unknown"]

    def __str__(self) -> str:
        described = {
            "files": f"commit {self.commit}",
            "git": f"another commit, {self.commit}",
            "edited": f"commit {self.commit} with edited files",
            "unknown": "version unknown",
        }
        return f"{described[self.source]}, at {self.root}"


def require(adapter: str, requirements: Iterable[Requirement]) -> None:
    """Check `requirements` and stop with everything that is not met.

    Raises:
        HostContractError: The host is not on the path, one of its packages is not installed, or
            the host lacks a required name or parameter.
    """
    if importlib.util.find_spec(HOST_PACKAGE) is None:
        raise HostContractError(f"{adapter}: no {HOST_PACKAGE} on the path. {how_to_get_host()}")
    try:
        problems = check(requirements)
    except ModuleNotFoundError as error:
        raise HostContractError(f"{adapter}: {_missing_packages(str(error.name))}") from error
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise HostContractError(
            f"{adapter}: the host ({host_version()}) lacks what this adapter uses:\n"
            f"{listed}\nTested: commits {', '.join(KNOWN_COMMITS)} of {HOST_URL}",
            tuple(problems),
        )


def check(requirements: Iterable[Requirement]) -> list[str]:
    """Look up every requirement in the host.

    Returns:
        One line for each requirement that is not met; empty if all are.

    Raises:
        ModuleNotFoundError: A package other than the host is not installed.
    """
    problems = map(_problem, requirements)
    return list(dict.fromkeys(problem for problem in problems if problem))


def how_to_get_host() -> str:
    """How to put the host on the path, in one line."""
    return (
        f"The host is not on a package registry: git clone {HOST_URL}, "
        f"check out {next(iter(KNOWN_COMMITS))} and add the folder to PYTHONPATH"
    )


def host_version() -> HostVersion:
    """The host's commit, from its files if they are those of a tested commit, else from git."""
    root = _host_root()
    if root is None:
        return HostVersion(None, None, "unknown")
    for commit, blobs in KNOWN_COMMITS.items():
        if all(blob_id(root / HOST_PACKAGE / path) == blob for path, blob in blobs.items()):
            return HostVersion(root, commit, "files")
    # Only a repository of the host's own: the folder may lie inside another one.
    head = _git(root, "rev-parse", "--short=7", "HEAD") if (root / ".git").exists() else None
    if head is None:
        return HostVersion(root, None, "unknown")
    changed = _git(root, "status", "--porcelain", "--untracked-files=no", "--", HOST_PACKAGE)
    return HostVersion(root, head, "edited" if changed else "git")


def accepts(function: Callable[..., Any], parameter: str) -> bool:
    """Whether `function` takes `parameter` by name; gin's wrappers are looked through."""
    return parameter in inspect.signature(function).parameters


def _problem(requirement: Requirement) -> str | None:
    """Why `requirement` does not hold, or None; an absent package raises."""
    name = f"{requirement.module}.{requirement.name}"
    try:
        found = pkgutil.resolve_name(f"{requirement.module}:{requirement.name}")
    except AttributeError as error:
        return f"{name}: not there ({error})"
    except Exception as error:  # importing a host module can fail in any way
        if _names_another_package(error):
            raise
        return f"{requirement.module}: does not import ({type(error).__name__}: {error})"
    missing = [wanted for wanted in requirement.parameters if not accepts(found, wanted)]
    return f"{name}: takes no parameter {', '.join(missing)}" if missing else None


def _names_another_package(error: Exception) -> bool:
    """Whether `error` says that a package, not a part of the host, is missing."""
    return isinstance(error, ModuleNotFoundError) and not str(error.name).startswith(HOST_PACKAGE)


def _missing_packages(first: str) -> str:
    """One line: the packages of the host that are not installed, and how to install them."""
    absent = [name for name in PIP_NAMES if importlib.util.find_spec(name) is None]
    package = first.partition(".")[0]
    absent += [package] if package not in absent else []
    pip_names = " ".join(PIP_NAMES.get(name, name) for name in absent)
    return (
        f"the host needs packages that are not installed: {', '.join(absent)}. `make host "
        f"HOST=path` makes an environment that has them; by hand: pip install --no-deps "
        f"{pip_names}, in the versions of the extras host and host-no-deps in setup.cfg"
    )


def _host_root() -> Path | None:
    spec = importlib.util.find_spec(HOST_PACKAGE)
    if spec is None:
        return None
    folders = spec.submodule_search_locations
    return Path(folders[0]).parent if folders else None


def _git(root: Path, *arguments: str) -> str | None:
    """The output of a git command in `root`, None if it fails."""
    command = ["git", "-C", str(root), *arguments]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()
