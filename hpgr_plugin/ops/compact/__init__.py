"""From full sequences to the short ones that a plan keeps, and the way back of the gradients.

`parts.py` computes which rows go where; `compact` copies them. A column of weight 0 reaches no
other row of HSTU's pointwise attention, so dropping it changes nothing, provided that positions,
times and 1/n stay those of the full sequence: encode first, compact second.
"""

from torch import Tensor

from hpgr_plugin.ops.compact.parts import KeptRows
from hpgr_plugin.ops.dispatch import triton_operator

__all__ = ["KeptRows", "compact"]

_OPERATOR = triton_operator(__name__)


def compact(
    history: Tensor, candidates: Tensor, kept: KeptRows, *, backend: str | None = None
) -> Tensor:
    """Copy the kept rows, zero beyond the last sequence; nothing waits for the device.

    Args:
        history: `[T, D]`.
        candidates: `[C, D]`.
        kept: which rows of both.
        backend: "triton", "torch" or "naive"; None: the fastest that can.

    Returns:
        `[kept.num_rows, D]`.
    """
    rows: Tensor = _OPERATOR(history, candidates, kept, backend=backend)
    return rows
