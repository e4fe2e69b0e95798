"""Titles of items, for examples that people read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hpgr_plugin.data.events import DataError, location

_SEPARATORS = {".dat": "::", ".item": "\t"}  # MovieLens: movies.dat, u.item (by |), ml-100k.item


@dataclass(frozen=True, kw_only=True)
class ItemTitles:
    """Titles from a MovieLens file: `movies.dat`, `ml-100k.item` or `u.item`.

    Args:
        path: of the file; "" for none, and a file that is not there has none either.
    """

    path: str = location("")

    def read(self) -> dict[str, str]:
        """Item id as text -> title.

        Raises:
            DataError: a file of another kind.
        """
        file = Path(self.path)
        if not self.path or not file.is_file():
            return {}
        separator = "|" if file.name == "u.item" else _SEPARATORS.get(file.suffix)
        if separator is None:
            raise DataError("no movies.dat, ml-100k.item or u.item", file=file)
        lines = [row.split(separator) for row in file.read_text("latin-1").splitlines() if row]
        return {line[0]: line[1] for line in lines if len(line) > 1}
