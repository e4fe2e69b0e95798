"""Label rules: which value of which field counts as a positive."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class LabelRule:
    """label = 1 where `field` >= threshold, else 0."""

    field: str
    threshold: float

    def labels(self, values: np.ndarray) -> np.ndarray:
        """int8 [E] of values [E]."""
        return (values >= self.threshold).astype(np.int8)


def rating_at_least(threshold: float = 4.0, field: str = "rating") -> LabelRule:
    """A rating of at least `threshold` is a positive."""
    return LabelRule(field=field, threshold=threshold)


def label_column(field: str = "label") -> LabelRule:
    """The field holds the label itself, 0 or 1."""
    return LabelRule(field=field, threshold=0.5)
