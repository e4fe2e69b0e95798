"""One kernel per layer, which gathers every row that a candidate reads."""

import torch
import triton
from torch import Tensor

from hpgr_plugin.ops.slot_attention.kernels import slot_attention_kernel
from hpgr_plugin.ops.slot_attention.slots import KeptRows, NewRows, Settings, SlotBias, Slots

LARGEST_HEAD = 256
_ROWS = 32  # gathered at once
_DTYPES = torch.float32, torch.bfloat16, torch.float16


def slot_attention(
    new: NewRows, kept: KeptRows, slots: Slots, bias: SlotBias | None, settings: Settings
) -> Tensor:
    """See `hpgr_plugin.ops.slot_attention.slot_attention`."""
    q, k, v = (x if x.stride(1) == 1 else x.contiguous() for x in new)
    keys, values = (x.contiguous() for x in kept)
    count, width = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if count == 0:
        return out
    size = width // slots.num_heads
    table, near, own = slots.near, slots.near, slots.index  # not read without a bias
    if bias is not None:
        table, near, own = bias.table.contiguous(), bias.near.contiguous(), bias.slots.contiguous()
    slot_attention_kernel[(count, slots.num_heads)](
        q,
        k,
        v,
        keys,
        values,
        slots.near.contiguous(),
        slots.index.contiguous(),
        slots.weights.contiguous(),
        table,
        near,
        own,
        out,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        0 if bias is None or len(bias.near) == 1 else bias.near.shape[1],
        len(slots.near),
        slots.index.shape[1],
        slots.num_rows,
        0 if bias is None else bias.own,
        settings.alpha,
        1.0 / settings.norm_length,
        HEADS=slots.num_heads,
        SIZE=size,
        WIDE=max(16, triton.next_power_of_2(size)),
        ROWS=_ROWS,
        BIASED=bias is not None,
        PRE=settings.mask_position == "pre",
        num_warps=2,
    )
    return out


def why_not(
    new: NewRows, _kept: KeptRows, slots: Slots, _bias: SlotBias | None, _settings: Settings
) -> str | None:
    """Why the kernel does not support the case, or None."""
    q = new[0]
    if q.dtype not in _DTYPES:
        return f"dtype {q.dtype}"
    if q.shape[1] // slots.num_heads > LARGEST_HEAD:
        return f"heads of {q.shape[1] // slots.num_heads}, more than {LARGEST_HEAD}"
    return None
