"""The same in plain torch, on any device."""

import torch
import torch.nn.functional as F
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
    """The operator's torch backend, see `hpgr_plugin.ops.compact`."""
    del disjoint  # the gradient is added up in any case
    used = torch.arange(num_rows, device=index.device) < offsets[-1]
    zero = history.new_zeros(1, history.shape[1])
    source = torch.cat([history, candidates, zero])
    # Not index_select: embedding's backward adds up copies of a row in a fixed order on CUDA too.
    return F.embedding(torch.where(used, index[:num_rows].long(), len(source) - 1), source)
