"""What a plan is, and the weight of an item by its distance to the nearest anchor (Eq. 5)."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class PreferencePlan(NamedTuple):
    """A CSR matrix, rows (candidates, or users) by history tokens.

    Attributes:
        index: `[P]` int64, rows of the flat history kept for each row, ascending in a row.
        weights: `[P]` float32 (float64 where the embeddings are float64), M_j in [eps, 1].
        offsets: `[R + 1]` int64; row r owns `index[offsets[r]:offsets[r + 1]]`.
    """

    index: Tensor  # type: ignore[assignment]  # a tuple has an index method too
    weights: Tensor
    offsets: Tensor


def gaussian_kernel(sigma: float, eps: float, longest: int) -> Tensor:
    """M by distance: `exp(-d^2 / (2 sigma^2))` for d = 0, 1, ... while it is at least eps.

    Returns:
        `[radius + 1]` float64, radius < max(1, longest).
    """
    radius = min(max(0, longest - 1), math.ceil(sigma * math.sqrt(-2.0 * math.log(eps))))
    distance = torch.arange(radius + 1, dtype=torch.float64)
    kernel = torch.exp(-distance.square() / (2.0 * sigma**2))
    return kernel[kernel >= eps]
