"""How good a tokenizer is: collisions, use of the codebooks, and digits that like items share."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

COLLAPSED = 0.5  # a codebook whose use is below this has collapsed
_CHUNK = 2048  # items whose neighbours are found at once


def collision_rate(digits: Tensor) -> float:
    """The share of items whose digits `[V, D]` another item has already: 1 - distinct / V."""
    return 1.0 - len(digits.unique(dim=0)) / len(digits)


def codebook_use(digits: Tensor, codebook_size: int) -> list[float]:
    """Entropy of the digits of each level over that of equal use, in [0, 1].

    Equal use is over K codewords, or over V where there are fewer items.
    """
    most = math.log(min(codebook_size, len(digits)))
    uses = []
    for column in digits.unbind(1):
        shares = column.bincount(minlength=codebook_size).double() / len(digits)
        entropy = float(torch.special.entr(shares).sum())
        uses.append(entropy / most if most else 1.0)
    return uses


def consistency(embeddings: Tensor, digits: Tensor, *, neighbours: int = 10) -> float:
    """How often an item and one of its nearest by cosine share their first digit.

    Args:
        embeddings: `[V, H]`, what the tokenizer read.
        digits: int64 `[V, D]`.
        neighbours: nearest items of each.
    """
    count = min(neighbours, len(embeddings) - 1)
    if count < 1:
        return 1.0
    units, first, shared = F.normalize(embeddings, dim=1), digits[:, 0], 0.0
    for start in range(0, len(units), _CHUNK):
        part = units[start : start + _CHUNK] @ units.T
        own = torch.arange(start, start + len(part), device=part.device)
        part[own - start, own] = -torch.inf
        nearest = part.topk(count, dim=1).indices
        shared += float((first[nearest] == first[own].unsqueeze(1)).sum())
    return shared / (len(units) * count)


def tokenizer_quality(embeddings: Tensor, digits: Tensor, codebook_size: int) -> dict[str, float]:
    """All of the above: "collision_rate", "codebook_use" (mean and least over levels),
    "consistency"."""
    uses = codebook_use(digits, codebook_size)
    return {
        "collision_rate": collision_rate(digits),
        "codebook_use": sum(uses) / len(uses),
        "least_codebook_use": min(uses),
        "consistency": consistency(embeddings, digits),
    }
