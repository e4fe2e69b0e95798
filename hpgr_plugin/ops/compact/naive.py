"""Row by row: the reference of `hpgr_plugin.ops.compact.compact`."""

import torch
from torch import Tensor


def compact(
    history: Tensor,
    candidates: Tensor,
    index: Tensor,
    offsets: Tensor,
    *,
    num_rows: int,
    disjoint: bool = False,
) -> Tensor:
    """See the operator."""
    rows = [history.new_zeros(history.shape[1:]) for _ in range(num_rows)]
    for row in range(int(offsets[-1])):
        source = int(index[row])
        rows[row] = history[source] if source < len(history) else candidates[source - len(history)]
    return torch.stack(rows) if rows else history[:0]
