"""The same in plain torch, on any device."""

import torch
import torch.nn.functional as F
from torch import Tensor

from hpgr_plugin.ops.compact.parts import KeptRows


def compact(history: Tensor, candidates: Tensor, kept: KeptRows) -> Tensor:
    """The operator's torch backend, see `hpgr_plugin.ops.compact`."""
    index = kept.index[: kept.num_rows].long()
    used = torch.arange(kept.num_rows, device=index.device) < kept.offsets[-1]
    source = torch.cat([history, candidates, history.new_zeros(1, history.shape[1])])
    # Not index_select: embedding's backward adds up copies of a row in a fixed order on CUDA too.
    return F.embedding(torch.where(used, index, len(source) - 1), source)
