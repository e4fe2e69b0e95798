"""Apply the project's patch series to a checkout of the host, and revert it.

The files in `patches/` at the top of this project carry no line of the host: they have no context
and only add lines. Git cannot tell from them whether a file is the one they were written for, so
the blob id of every file is compared first, and a checkout of another version is not touched.
"""

from hpgr_plugin.patches.checkout import PatchError, State, apply, check, revert
from hpgr_plugin.patches.series import FileChange, Series, load_series

__all__ = [
    "FileChange",
    "PatchError",
    "Series",
    "State",
    "apply",
    "check",
    "load_series",
    "revert",
]
