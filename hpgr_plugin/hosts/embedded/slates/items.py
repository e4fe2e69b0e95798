"""What the tokenizer is trained on: batches of items, and for each the items that go with it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hpgr_plugin.components.slates.alignment import nearest_items
from hpgr_plugin.data.batches import Loader
from hpgr_plugin.data.log import TRAIN, PreparedData, offsets_of

_LEAST_TOGETHER = 2  # users who took both items


class ItemLoader(Loader[Tensor]):
    """Batches of item codes, int64 `[R]`; every process gets the same.

    Args:
        num_items: V.
        passes: times that every item comes in an epoch.
        batch_items: R.
        seed: of the order.
    """

    def __init__(self, num_items: int, *, passes: int, batch_items: int, seed: int) -> None:
        self._num_items = num_items
        ones = np.ones(num_items * passes, dtype=np.int64)
        super().__init__(ones, batch_tokens=batch_items, seed=seed, prefetch=0)

    def gather(self, places: np.ndarray) -> Tensor:
        """See `Loader.gather`."""
        return torch.from_numpy(places.astype(np.int64) % self._num_items)


def positive_items(
    data: PreparedData, vectors: Tensor, *, window: int, most: int, least_cosine: float
) -> Tensor:
    """Items that go with each item, int64 `[V, P]`, -1 behind the last.

    Those are the ones that users most often took within `window` events of it, by the count over
    the root of both items' counts, in the train split; and its neighbours with a cosine of at least
    `least_cosine`.

    Args:
        data: the log.
        vectors: `[V, E]`.
        window: events.
        most: of each of the two kinds.
        least_cosine: of neighbours.
    """
    together = _taken_together(data, window, most)
    near = nearest_items(vectors, min(most, len(vectors) - 1)).cpu()
    units = torch.nn.functional.normalize(vectors, dim=1).cpu()
    cosine = (units.unsqueeze(1) * units[near]).sum(2)
    found = torch.cat([torch.from_numpy(together), near.masked_fill(cosine < least_cosine, -1)], 1)
    return found.gather(1, (found < 0).long().argsort(dim=1, stable=True))


def draw_positives(positives: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
    """One positive for each item `[R]`, and whether it has any."""
    rows = positives[items]
    count = (rows >= 0).sum(1)
    drawn = (torch.rand(len(items)).to(rows.device) * count).long()
    return rows.gather(1, drawn.unsqueeze(1)).squeeze(1).clamp(min=0), count > 0


def _taken_together(data: PreparedData, window: int, most: int) -> np.ndarray:
    """The `most` items that go most often with each, int64 [V, most], -1 behind the last."""
    kept = data.is_history & (data.split == TRAIN)
    item = data.log.item[kept].astype(np.int64)
    user = data.log.event_users()[kept]
    size = data.log.num_items
    pairs = [np.zeros(0, dtype=np.int64)]
    for step in range(1, window + 1):
        same = user[step:] == user[:-step]
        a, b = item[:-step][same], item[step:][same]
        pairs += [a * size + b, b * size + a]
    code, count = np.unique(np.concatenate(pairs), return_counts=True)
    code, count = code[count >= _LEAST_TOGETHER], count[count >= _LEAST_TOGETHER]
    a, b = code // size, code % size
    a, b, count = a[a != b], b[a != b], count[a != b]
    popularity = np.bincount(item, minlength=size)
    order = np.lexsort((b, -count / np.sqrt(popularity[a] * popularity[b]), a))
    a, b = a[order], b[order]
    place = np.arange(len(a)) - offsets_of(np.bincount(a, minlength=size))[a]
    found = np.full((size, most), -1, dtype=np.int64)
    found[a[place < most], place[place < most]] = b[place < most]
    return found
