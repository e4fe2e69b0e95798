"""Ways in which a file comes to harm, drawn at random."""

import pickle
import random
from pathlib import Path

FOREIGN = (
    b"",
    b"not what it was\n",
    b"{}",
    b"[]",
    b"null",
    b"\x00" * 64,
    b"PK\x03\x04" + b"\x00" * 40,
    b"\x93NUMPY\x01\x00",
    b"\xff\xfe" * 30,
    pickle.dumps({"a": 1}),
    pickle.dumps([1] * 1000),
)


def damaged(content: bytes, chance: random.Random) -> bytes:
    """Cut off, partly overwritten, with a flipped bit, longer, or another file altogether."""
    place = chance.randrange(max(1, len(content)))
    size = chance.choice([1, 4, 64])
    match chance.randrange(6):
        case 0:
            return chance.choice(FOREIGN)
        case 1:
            return content[:place]
        case 2:
            return content[:place] + chance.randbytes(size) + content[place + size :]
        case 3:
            return content[:place] + b"\x00" * size + content[place + size :]
        case 4:
            return content + chance.randbytes(size)
        case _:
            flipped = bytearray(content)
            flipped[place] ^= 1 << chance.randrange(8)
            return bytes(flipped)


def damage_one(paths: list[Path], chance: random.Random) -> tuple[Path, bytes | None]:
    """Damage or remove one of the files.

    Returns:
        Its path and the content that it had; None instead of the path's content cannot be.
    """
    path = chance.choice(paths)
    before = path.read_bytes()
    if chance.randrange(12) == 0:
        path.unlink()
        if chance.randrange(2):
            path.mkdir()
    else:
        path.write_bytes(damaged(before, chance))
    return path, before


def restore(path: Path, before: bytes) -> None:
    """Undo `damage_one`."""
    if path.is_dir():
        path.rmdir()
    path.write_bytes(before)
