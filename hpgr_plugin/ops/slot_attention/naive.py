"""The definition, candidate by candidate."""

import torch
import torch.nn.functional as F
from torch import Tensor

from hpgr_plugin.ops.slot_attention.slots import KeptRows, NewRows, Settings, SlotBias, Slots


def slot_attention(
    new: NewRows, kept: KeptRows, slots: Slots, bias: SlotBias | None, settings: Settings
) -> Tensor:
    """See `hpgr_plugin.ops.slot_attention.slot_attention`."""
    q, k, v = (x.unflatten(1, (slots.num_heads, -1)) for x in new)
    rows = []
    for c in range(len(q)):
        filled = slots.weights[c] > 0
        places = torch.cat([slots.near, slots.index[c][filled]])
        weights = torch.cat([torch.ones(1 + len(slots.near)).to(q), slots.weights[c][filled].to(q)])
        keys, values = (
            torch.cat([own[c].unsqueeze(1), rows_of[:, places]], 1)
            for own, rows_of in zip((k, v), kept, strict=True)
        )
        scores = settings.alpha * torch.einsum("hd,hjd->hj", q[c], keys)
        if bias is not None:
            near = bias.near.expand(len(q), -1)[c]
            own = torch.tensor([bias.own], device=q.device)
            scores = scores + bias.table[torch.cat([own, near, bias.slots[c][filled]])]
        pre = settings.mask_position == "pre"
        attention = F.silu(weights * scores) if pre else F.silu(scores) * weights
        rows.append(torch.einsum("hj,hjd->hd", attention / settings.norm_length, values).flatten())
    return torch.stack(rows) if rows else new[0].clone()
