"""Check, apply and revert the series on a checkout."""

from __future__ import annotations

import enum
import hashlib
import os
import subprocess
from pathlib import Path

from hpgr_plugin.patches.series import HOST_COMMIT, Series, load_series


class State(enum.Enum):
    """The two states of a checkout that the series knows."""

    CLEAN = "clean"  # every file is the one the series was written for
    APPLIED = "applied"  # every file is the one the series leaves


class PatchError(RuntimeError):
    """The operation does not apply to the checkout; nothing in it was changed."""


def check(host: Path, series: Series | None = None) -> State:
    """Tell whether the series can be applied to `host` or is applied already, without writing.

    Raises:
        PatchError: `host` is another version, is edited, or holds a part of the series; the message
            names every file that differs.
    """
    series = series or load_series()
    found = {path: blob_id(host / path) for path in series.before}
    if found == series.before:
        return State.CLEAN
    if found == series.after:
        return State.APPLIED
    lines = [
        f"  {path}: {_describe(blob, series.before[path], series.after[path])}"
        for path, blob in found.items()
        if blob != series.before[path]
    ]
    raise PatchError(
        f"{host} is not the host's commit {HOST_COMMIT} as published; nothing was changed:\n"
        + "\n".join(lines)
        + f"\nThe series fits only that commit: git checkout {HOST_COMMIT}"
    )


def apply(host: Path, series: Series | None = None) -> None:
    """Apply the whole series to `host`.

    Raises:
        PatchError: The series is applied already, or `check` refuses the checkout.
    """
    _transform(host, series or load_series(), reverse=False)


def revert(host: Path, series: Series | None = None) -> None:
    """Revert the whole series in `host`; the files are then what they were, byte for byte.

    Raises:
        PatchError: The series is not applied, or `check` refuses the checkout.
    """
    _transform(host, series or load_series(), reverse=True)


def blob_id(path: Path) -> str | None:
    """The id that git gives to the bytes of a file, or None if there is no file."""
    if not path.is_file():
        return None
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _transform(host: Path, series: Series, *, reverse: bool) -> None:
    """Run git over the patches; if anything goes wrong, restore every file."""
    if check(host, series) is (State.CLEAN if reverse else State.APPLIED):
        found = "not applied" if reverse else "applied already"
        raise PatchError(f"the series is {found} in {host}; nothing was changed")
    patches = series.patches[::-1] if reverse else series.patches
    wanted = series.before if reverse else series.after
    kept = {path: (host / path).read_bytes() for path in series.before}
    try:
        for patch in patches:
            _git_apply(host, patch, reverse=reverse)
        left = {path: blob_id(host / path) for path in wanted}
        if left != wanted:
            wrong = [path for path, blob in left.items() if blob != wanted[path]]
            raise PatchError(f"git left other content than expected in {', '.join(wrong)}")
    except BaseException:
        for path, content in kept.items():
            (host / path).write_bytes(content)
        raise


def _git_apply(host: Path, patch: Path, *, reverse: bool) -> None:
    command = ["git", "apply", "--unidiff-zero", "--whitespace=nowarn"]
    if reverse:
        command.append("--reverse")
    # Inside a repository git reads a patch's paths from the repository's top. The ceiling keeps
    # it from finding one above a checkout that is no repository itself.
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(host.resolve().parent)}
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX"):
        environment.pop(name, None)
    try:
        subprocess.run(
            [*command, str(patch.resolve())],
            cwd=host.resolve(),
            env=environment,
            check=True,
            capture_output=True,
            text=True,
        )
    except FileNotFoundError as error:
        raise PatchError("git is not on the PATH; nothing was changed") from error
    except subprocess.CalledProcessError as error:
        raise PatchError(
            f"git refused {patch.name}; nothing was changed: {error.stderr}"
        ) from error


def _describe(blob: str | None, before: str, after: str) -> str:
    if blob is None:
        return "not there"
    if blob == after:
        return "already as the series leaves it"
    return f"blob {blob[:12]}, expected {before[:12]}"
