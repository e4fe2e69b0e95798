"""Writing files so that an interrupted run leaves the old file or the new one, never a part."""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; its file replaces `path` when the block ends.

    Folders are made as needed. If the block raises, `path` stays as it was.

    Args:
        path: the file to write.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def crc32(path: Path, *, leave_out: int = 0) -> int:
    """CRC-32 of a file, or of all but its last `leave_out` bytes."""
    checksum, left = 0, path.stat().st_size - leave_out
    with path.open("rb") as file:
        while left > 0 and (block := file.read(min(left, 1 << 20))):
            checksum = zlib.crc32(block, checksum)
            left -= len(block)
    return checksum


def remove_temporary_files(directory: Path) -> None:
    """Remove files and folders "NAME.<process>.tmp" of killed runs anywhere below a folder.

    Call it only while no other process writes there.
    """
    for path in list(directory.rglob("*.tmp")):
        if path.suffixes[-2:-1] and path.suffixes[-2][1:].isdigit():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
