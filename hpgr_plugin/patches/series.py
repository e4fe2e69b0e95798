"""The series as files: the blobs it starts from and the blobs it leaves."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

SERIES_FOLDER = Path(__file__).resolve().parents[2] / "patches"
HOST_COMMIT = "db1bf8f"

_FILE = re.compile(r"^diff --git a/(?P<old>\S+) b/(?P<new>\S+)$")
_BLOBS = re.compile(r"^index (?P<before>[0-9a-f]{40})\.\.(?P<after>[0-9a-f]{40}) \d{6}$")


class FileChange(NamedTuple):
    """One file of one patch.

    Attributes:
        path: In the host's checkout.
        before: Full git blob id that the patch starts from.
        after: Full git blob id that it leaves.
    """

    path: str
    before: str
    after: str


class Series(NamedTuple):
    """The patches in order.

    Attributes:
        patches: The patch files, ascending by number.
        before: Path -> blob id without the series.
        after: Path -> blob id with all of it.
    """

    patches: tuple[Path, ...]
    before: dict[str, str]
    after: dict[str, str]


def load_series(folder: Path = SERIES_FOLDER) -> Series:
    """Read the numbered patches of `folder`.

    Raises:
        FileNotFoundError: There are no patches; an installed package does not contain them.
        ValueError: A patch lacks full blob ids, or does not start where the one before it ended.
    """
    patches = tuple(sorted(folder.glob("[0-9][0-9][0-9][0-9]-*.patch")))
    if not patches:
        raise FileNotFoundError(
            f"no numbered patches in {folder}: the series is part of the project's checkout"
        )
    before: dict[str, str] = {}
    after: dict[str, str] = {}
    for patch in patches:
        for change in file_changes(patch.read_text(encoding="utf-8").splitlines()):
            if after.get(change.path, change.before) != change.before:
                raise ValueError(
                    f"{patch.name} starts from {change.before} for {change.path}, "
                    f"the patches before it leave {after[change.path]}"
                )
            before.setdefault(change.path, change.before)
            after[change.path] = change.after
    return Series(patches, before, after)


def file_changes(lines: Iterable[str]) -> list[FileChange]:
    """The files a patch changes, from its `diff --git` and `index` lines.

    Raises:
        ValueError: A file has no line of two full blob ids.
    """
    changes: list[FileChange] = []
    path: str | None = None
    for line in lines:
        if line.startswith("diff --git "):
            if path is not None:
                raise ValueError(f"no line of full blob ids for {path}")
            header = _FILE.match(line)
            if header is None or header["old"] != header["new"]:
                raise ValueError(f"not a change of one file in place: {line}")
            path = header["new"]
        elif path is not None and (blobs := _BLOBS.match(line)):
            changes.append(FileChange(path, blobs["before"], blobs["after"]))
            path = None
    if path is not None:
        raise ValueError(f"no line of full blob ids for {path}")
    return changes
