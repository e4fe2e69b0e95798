"""Slate metrics: what the user took next against the slate, and their test outcomes on disk."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from hpgr_plugin.data import RequestLoader
from hpgr_plugin.errors import HpgrError
from hpgr_plugin.files import atomic_write
from hpgr_plugin.hosts.embedded.slates.model import SlateModel, padded_labels, padded_slates
from hpgr_plugin.hosts.embedded.train.distributed import Process, gather_arrays

OUTCOMES = "slates.npz"
METRICS = ("hit", "recall", "ndcg")
TARGETS = ("", "liked_")  # all next items (impressions), and those with a positive label


class Outcomes(NamedTuple):
    """The slates of R requests and what the users took; R in the order of the log.

    Attributes:
        user: int64 [R].
        slate: int64 [R, M].
        target: int64 [R, M], -1 behind the end.
        liked: bool [R, M], whether each target has a positive label.
    """

    user: np.ndarray
    slate: np.ndarray
    target: np.ndarray
    liked: np.ndarray

    def per_request(self) -> dict[str, np.ndarray]:
        """Every metric of every request, float64 [R]; NaN where there is no such target."""
        found: dict[str, np.ndarray] = {}
        for prefix in TARGETS:
            counted = self.target >= 0
            if prefix:
                counted &= self.liked
            values = list_metrics(self.slate, self.target, counted)
            found |= {prefix + name: value for name, value in values.items()}
        return found

    def metrics(self) -> dict[str, float]:
        """The means over requests."""
        size = self.slate.shape[1]
        return {
            f"{name}@{size}": float(np.nanmean(values)) if np.isfinite(values).any() else 0.0
            for name, values in self.per_request().items()
        }


def list_metrics(
    slate: np.ndarray, target: np.ndarray, counted: np.ndarray
) -> dict[str, np.ndarray]:
    """ "hit" (any target in the slate), "recall" (share of them) and "ndcg" of every slate.

    Args:
        slate: int64 [R, M].
        target: int64 [R, N].
        counted: bool [R, N], the targets that count.

    Returns:
        float64 [R] each; NaN for a request without a target.
    """
    match = (slate[:, :, None] == target[:, None, :]) & counted[:, None, :]
    relevant = match.any(2)
    count = counted.sum(1)
    discount = 1 / np.log2(np.arange(slate.shape[1]) + 2)
    ideal = np.concatenate([[0.0], discount.cumsum()])[np.minimum(count, slate.shape[1])]
    with np.errstate(invalid="ignore", divide="ignore"):
        recall = match.any(1).sum(1) / count
        ndcg = (relevant * discount).sum(1) / ideal
    hit = np.where(count > 0, relevant.any(1), np.nan)
    return {"hit": hit, "recall": recall, "ndcg": ndcg}


@torch.no_grad()
def outcomes(model: SlateModel, loader: RequestLoader, process: Process) -> Outcomes:
    """Generate a slate for every request of a loader, on all processes."""
    nothing, no_slates = np.zeros(0, np.int64), np.zeros((0, model.slate_size), np.int64)
    parts = [(nothing, nothing, no_slates, no_slates, no_slates)]  # a process may have no batch
    for batch in loader.batches():
        batch = batch.to(process.device)
        target, lengths = padded_slates(batch, model.slate_size)
        slot = torch.arange(model.slate_size, device=target.device)
        target = torch.where(slot < lengths.unsqueeze(1), target, -1)
        time = batch.candidate_timestamps[batch.candidate_offsets[:-1]]
        labels = padded_labels(batch, model.slate_size).long()
        columns = (batch.users, time, model.generate(batch).items, target, labels)
        parts.append(tuple(column.cpu().numpy() for column in columns))  # type: ignore[arg-type]
    whole = [np.concatenate(column) for column in zip(*parts, strict=True)]
    user, when, slate, taken, liked = gather_arrays(whole)
    order = np.lexsort((taken[:, 0], when, user))
    return Outcomes(user[order], slate[order], taken[order], liked[order] > 0)


def save_outcomes(path: Path, found: Outcomes) -> None:
    """Write the outcomes."""
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **found._asdict())


def load_outcomes(path: Path) -> Outcomes:
    """Read outcomes.

    Raises:
        HpgrError: there is no such file, or it is damaged.
    """
    try:
        with np.load(path) as file:
            return Outcomes(**{name: file[name] for name in Outcomes._fields})
    except FileNotFoundError as error:
        raise HpgrError(f"no slates at {path}") from error
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise HpgrError(f"{path} is damaged or no file of slates: {error}") from error


@dataclass(frozen=True)
class Difference:
    """A difference of means and its 95% interval over users."""

    value: float
    low: float
    high: float
    relative: float


def difference(
    found: list[Outcomes], reference: list[Outcomes], metric: str, *, resamples: int = 1000
) -> Difference:
    """The difference of a metric, averaged over seeds, by a paired bootstrap over users.

    Args:
        found: one per seed.
        reference: the same requests, one per seed.
        metric: a key of `Outcomes.per_request`.
        resamples: of the bootstrap.

    Raises:
        ValueError: the requests are not the same.
    """
    first = found[0]
    if not all(np.array_equal(first.target, other.target) for other in [*found, *reference]):
        raise ValueError("the outcomes are not of the same requests")
    mine, theirs = (
        np.mean([each.per_request()[metric] for each in side], axis=0)
        for side in (found, reference)
    )
    counted = np.isfinite(mine)
    user = np.unique(first.user[counted], return_inverse=True)[1]
    number = user.max() + 1 if len(user) else 0
    count = np.bincount(user, minlength=number)
    gap = np.bincount(user, mine[counted] - theirs[counted], minlength=number)
    random, values = np.random.default_rng(0), []
    for _ in range(resamples):
        drawn = random.integers(number, size=number)
        values.append(gap[drawn].sum() / count[drawn].sum())
    low, high = np.quantile(values, [0.025, 0.975])
    value = float(gap.sum() / count.sum())
    base = float(theirs[counted].mean())
    return Difference(value, float(low), float(high), value / base if base else 0.0)
