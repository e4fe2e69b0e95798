"""How many rows are computed at once."""

from __future__ import annotations

from typing import Literal

import torch

Use = Literal["history", "plan", "candidates"]

# Numbers of a result at once: on a CPU what its cache holds, on a GPU what its memory does.
ON_CPU: dict[Use, int] = {"history": 2**22, "plan": 2**20, "candidates": 2**18}
ON_GPU = 2**27


def rows_at_once(use: Use, width: int, device: torch.device) -> int:
    """Rows of `width` numbers that are computed at once, at least 1."""
    elements = ON_CPU[use] if device.type == "cpu" else ON_GPU
    return max(1, elements // max(1, width))
