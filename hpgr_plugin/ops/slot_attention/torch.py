"""Products with the shared rows; the slots by sparse products on a CPU, gathered on a GPU."""

import torch
import torch.nn.functional as F
from torch import Tensor

from hpgr_plugin.ops.slot_attention.slots import KeptRows, NewRows, Settings, SlotBias, Slots


def slot_attention(
    new: NewRows, kept: KeptRows, slots: Slots, bias: SlotBias | None, settings: Settings
) -> Tensor:
    """See `hpgr_plugin.ops.slot_attention.slot_attention`."""
    q, k, v = (x.unflatten(1, (slots.num_heads, -1)).transpose(0, 1) for x in new)
    q = q * settings.alpha
    scores = (q * k).sum(2, keepdim=True)
    if bias is not None:
        scores += bias.table[bias.own].to(scores.dtype)
    attended = F.silu(scores, inplace=True).div_(settings.norm_length) * v
    if len(slots.near):
        attended += _near(q, *kept, slots.near, bias, settings)
    if slots.index.numel():
        attended += _slots(q, *kept, slots, bias, settings)
    return attended.transpose(0, 1).flatten(1)


def _near(
    q: Tensor, keys: Tensor, values: Tensor, near: Tensor, bias: SlotBias | None, settings: Settings
) -> Tensor:
    """What all read; q `[H, c, d]`, scaled."""
    scores = q @ keys.index_select(1, near).transpose(1, 2)
    if bias is not None:
        scores += bias.table[bias.near].to(scores.dtype)
    attention = F.silu(scores, inplace=True).div_(settings.norm_length)
    return attention @ values.index_select(1, near)


def _slots(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Slots,
    bias: SlotBias | None,
    settings: Settings,
) -> Tensor:
    """What each reads by itself; q `[H, c, d]`, scaled."""
    shape = slots.num_heads, *slots.index.shape
    scores = _scores(q.flatten(0, 1), keys.flatten(0, 1), slots).view(shape)
    if bias is not None:
        scores += bias.table[bias.slots].to(scores.dtype)
    weights = slots.weights.to(scores.dtype)
    if settings.mask_position == "pre":
        attention = F.silu(scores.mul_(weights), inplace=True).div_(settings.norm_length)
    else:
        attention = F.silu(scores, inplace=True).mul_(weights / settings.norm_length)
    sums = F.embedding_bag(
        slots.index_of_heads,
        values.flatten(0, 1),
        mode="sum",
        per_sample_weights=attention.flatten(0, 1).to(values.dtype),
    )
    return sums.view_as(q)


def _scores(q: Tensor, keys: Tensor, slots: Slots) -> Tensor:
    """`q . k` of every slot, `[H * c, S]`; q `[H * c, d]`, k `[H * N, d]`."""
    if q.is_cuda:
        return torch.bmm(keys[slots.index_of_heads], q.unsqueeze(2)).squeeze(2)
    pattern = slots.pattern
    torch.sparse.sampled_addmm(pattern, q, keys.t(), beta=0.0, out=pattern)
    return pattern.values()
