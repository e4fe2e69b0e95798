"""The worse slates y- of alignment, drawn for each user."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from hpgr_plugin.components.slates import alignment
from hpgr_plugin.components.slates.alignment import Objective
from hpgr_plugin.data import Batch, PreparedData
from hpgr_plugin.data.log import TRAIN, concatenated_ranges
from hpgr_plugin.hosts.embedded.train.trainer import TrainingRun

Diversity = Literal["similar", "dissimilar"]
_NEIGHBOURS = 8  # for every item of a slate: most of them are left when those taken are out


@dataclass(frozen=True)
class TakenItems:
    """The items that each user took in the train split.

    Attributes:
        items: int64 `[T]`.
        offsets: int64 `[U + 1]` into `items`.
        num_items: V.
    """

    items: np.ndarray
    offsets: np.ndarray
    num_items: int

    @staticmethod
    def of(data: PreparedData) -> TakenItems:
        """Those of prepared data; validation and test are not read."""
        kept = data.split == TRAIN
        before = np.concatenate([[0], kept.cumsum()])
        items = data.log.item[kept].astype(np.int64)
        return TakenItems(items, before[data.log.user_offsets], data.log.num_items)

    def mask(self, users: Tensor) -> Tensor:
        """Whether users `[B]` took each item, bool `[B, V]`."""
        rows = users.cpu().numpy()
        start = self.offsets[rows]
        count = self.offsets[rows + 1] - start
        found = torch.zeros(len(rows), self.num_items, dtype=torch.bool)
        owner = np.repeat(np.arange(len(rows)), count)
        items = self.items[concatenated_ranges(start, count)]
        found[torch.from_numpy(owner), torch.from_numpy(items)] = True
        return found.to(users.device)


class WorseSlates:
    """Draws y- for every user, the same at the same step of a resumed training.

    An item that the user takes anywhere in the train split comes in as a worse one only where no
    others are left: the items most similar to one that was taken are often taken too.

    Args:
        data: what users took.
        vectors: `[V, E]`, say what is similar.
        run: seed and process.
        slate_size: M.
        objectives: which are drawn.
        diversity: see `AlignSettings`.
    """

    def __init__(
        self,
        data: PreparedData,
        vectors: Tensor,
        run: TrainingRun,
        *,
        slate_size: int,
        objectives: Sequence[Objective],
        diversity: Diversity,
    ) -> None:
        self.run, self.objectives = run, objectives
        self.taken = TakenItems.of(data)
        count = min(_NEIGHBOURS * (slate_size - 1), len(vectors) - 1)
        self.near = alignment.nearest_items(
            vectors, max(count, slate_size - 1), farthest=diversity == "dissimilar"
        ).to(run.process.device)

    def draw(self, batch: Batch, better: Tensor, lengths: Tensor, step: int) -> Tensor:
        """One of the objectives for each user, `[B, M]`.

        Args:
            batch: the requests.
            better: y+ `[B, M]`.
            lengths: `[B]`.
            step: of the training.
        """
        seed = (self.run.seed << 32) + (step << 8) + self.run.process.rank
        rng = torch.Generator().manual_seed(seed)
        taken = self.taken.mask(batch.users)
        made = {
            "order": alignment.other_order(better, lengths, rng),
            "interest": alignment.replaced(better, _disliked(batch, taken), rng, never=taken),
            "diversity": alignment.too_similar(better, self.near, taken),
        }
        options = torch.stack([made[name] for name in self.objectives])
        drawn = torch.randint(len(options), (len(better),), generator=rng).to(better.device)
        return options[drawn, torch.arange(len(better), device=better.device)]


def _disliked(batch: Batch, taken: Tensor) -> Tensor:
    """Items that someone in the batch did not like, nobody in it liked, and the user did not take.

    Args:
        batch: B requests.
        taken: bool `[B, V]`.

    Returns:
        bool `[B, V]`.
    """
    bad = torch.zeros_like(taken[0])
    bad[batch.candidate_items[batch.candidate_labels < 0.5]] = True
    bad[batch.candidate_items[batch.candidate_labels >= 0.5]] = False
    return bad & ~taken
