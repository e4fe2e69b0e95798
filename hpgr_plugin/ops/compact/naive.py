"""Row by row: the reference of `hpgr_plugin.ops.compact.compact`."""

import torch
from torch import Tensor

from hpgr_plugin.ops.compact.parts import KeptRows


def compact(history: Tensor, candidates: Tensor, kept: KeptRows) -> Tensor:
    """See the operator."""
    rows = [history.new_zeros(history.shape[1:]) for _ in range(kept.num_rows)]
    for row in range(int(kept.offsets[-1])):
        source = int(kept.index[row])
        rows[row] = history[source] if source < len(history) else candidates[source - len(history)]
    return torch.stack(rows) if rows else history[:0]
