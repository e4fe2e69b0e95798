"""Test predictions of one training on disk: what every statistic of the report is made of."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hpgr_plugin.errors import HpgrError
from hpgr_plugin.files import atomic_write

PREDICTIONS = "predictions.npz"


class Predictions(NamedTuple):
    """Scored test candidates, in the order of the log.

    Attributes:
        user: int32 [C].
        group: int64 [C], whose AUC GAUC is the mean of: the user, or the impression.
        label: int8 [C], 0 or 1.
        score: float32 [C], probabilities.
    """

    user: np.ndarray
    group: np.ndarray
    label: np.ndarray
    score: np.ndarray

    def same_candidates(self, other: Predictions) -> bool:
        """Whether both score the same candidates, so that they can be compared in pairs."""
        return all(
            np.array_equal(getattr(self, name), getattr(other, name)) for name in ("user", "label")
        )


def task_predictions(task: str) -> str:
    """The file of a further task."""
    return f"predictions_{task}.npz"


def save_predictions(path: Path, predictions: Predictions) -> None:
    """Write compressed arrays of the names of `Predictions`."""
    arrays = predictions._asdict()
    if np.array_equal(predictions.group, predictions.user):
        del arrays["group"]
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)


def load_predictions(path: Path) -> Predictions:
    """Read what `save_predictions` wrote.

    Raises:
        HpgrError: there is no such file, or it is damaged.
    """
    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
        return Predictions(**{"group": arrays["user"]} | arrays)
    except FileNotFoundError as error:
        raise HpgrError(f"no predictions at {path}") from error
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise HpgrError(f"{path} is damaged or no file of predictions: {error}") from error
