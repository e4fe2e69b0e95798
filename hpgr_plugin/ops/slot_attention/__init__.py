"""Attention of candidates over rows that all of them read, and over a few rows of their own."""

from torch import Tensor

from hpgr_plugin.ops.dispatch import triton_operator
from hpgr_plugin.ops.slot_attention.slots import KeptRows, NewRows, Settings, SlotBias, Slots

__all__ = ["Settings", "SlotBias", "Slots", "slot_attention"]

_OPERATOR = triton_operator(__name__)


def slot_attention(
    new: NewRows,
    kept: KeptRows,
    slots: Slots,
    bias: SlotBias | None,
    settings: Settings,
    *,
    backend: str | None = None,
) -> Tensor:
    """Pointwise SiLU attention of c candidates; there is no gradient.

    With `s = alpha q . k + bias` a candidate sums `SiLU(s) / n * v` over itself and the rows
    `slots.near`, and the same times the weight over its slots ("pre": `SiLU(M s)`).

    Args:
        new: queries, keys and values `[c, H * d]` of the candidates.
        kept: keys and values `[H, N, d]` of the history, contiguous.
        slots: what each candidate reads.
        bias: of this layer, or None.
        settings: of the attention.
        backend: "triton", "torch" or "naive"; None: the fastest that can.

    Returns:
        `[c, H * d]`.
    """
    attended: Tensor = _OPERATOR(new, kept, slots, bias, settings, backend=backend)
    return attended
