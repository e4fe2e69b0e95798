"""Fetches MovieLens-100K: python -m hpgr_plugin.data.movielens_100k --out downloads/ml-100k

The data comes from a wheel of RecBole, which carries it as a sample, taken without its
dependencies; or, with --source or the environment variable ML100K, from a copy already here
(a folder with ml-100k.inter or with GroupLens' own u.data). Checksums are verified either way.
MovieLens is for research and may not be redistributed: see grouplens.org/datasets/movielens.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from hpgr_plugin.data.cache import file_digest
from hpgr_plugin.data.events import DataError

WHEEL = "recbole==1.2.1"
_INSIDE_WHEEL = "recbole/dataset_example/ml-100k"
SHA256 = {
    "ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
    "ml-100k.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
    "ml-100k.user": "4f670007d9cfbeb9807e757209af1555b9bcc186bde25e767f67cb67c6dd5972",
}
# GroupLens' own file holds the same ratings in the same order, without the header line.
_RATINGS = "ml-100k.inter"
_HEADER = b"user_id:token\titem_id:token\trating:float\ttimestamp:float\n"


def fetch(out: Path, source: Path | None = None) -> Path:
    """Puts the verified files into the folder `out`, all or none; does nothing if they are there.

    Args:
        out: the folder; its name appears only when everything in it is verified.
        source: a folder or ratings file of a copy already here. None: download.

    Raises:
        DataError: a checksum differs, or the download failed.
    """
    if out.exists():
        _verify(out, f"delete {out} to fetch it again")
        print(f"{out}: already there, checksums match")
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as aside:
        folder = Path(aside) / out.name
        folder.mkdir()
        if source is None:
            _from_wheel(folder, Path(aside))
        else:
            _from_copy(folder, source)
        _verify(folder, f"not the MovieLens-100K that is expected, from {source or WHEEL}")
        folder.rename(out)
    print(f"{out}: MovieLens-100K from {source or WHEEL}, checksums match")
    return out


def _from_wheel(folder: Path, aside: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    # Only a wheel: building a source distribution would run its code.
    command += ["--only-binary=:all:", "--dest", str(aside), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(aside.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise DataError(
            f"pip could not download {WHEEL} ({reason}); if you have a copy of the data, "
            "name its folder in the environment variable ML100K"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        _write(folder, list(SHA256), lambda name: wheel.read(f"{_INSIDE_WHEEL}/{name}"))


def _from_copy(folder: Path, source: Path) -> None:
    place = source if source.is_dir() else source.parent
    if (place / _RATINGS).exists():
        present = [name for name in SHA256 if (place / name).exists()]
        _write(folder, present, lambda name: (place / name).read_bytes())
    elif (place / "u.data").exists():
        _write(folder, [_RATINGS], lambda name: _HEADER + (place / "u.data").read_bytes())
    else:
        raise DataError(f"holds neither {_RATINGS} nor u.data", file=place)


def _write(folder: Path, names: list[str], content: Callable[[str], bytes]) -> None:
    for name in names:
        (folder / name).write_bytes(content(name))


def _verify(folder: Path, otherwise: str) -> None:
    if not (folder / _RATINGS).exists():
        raise DataError(f"missing; {otherwise}", file=folder / _RATINGS)
    for name, expected in SHA256.items():
        file = folder / name
        if file.exists() and (found := file_digest(file)) != expected:
            raise DataError(f"sha256 is {found}, expected {expected}; {otherwise}", file=file)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Fetch MovieLens-100K.")
    parser.add_argument("--out", type=Path, default=Path("downloads/ml-100k"))
    parser.add_argument("--source", type=Path, help="a copy already here (or set ML100K)")
    arguments = parser.parse_args()
    named = os.environ.get("ML100K")
    try:
        fetch(arguments.out, arguments.source or (Path(named) if named else None))
    except DataError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
