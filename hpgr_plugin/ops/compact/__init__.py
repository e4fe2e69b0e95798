"""From full sequences to the short ones that a plan keeps, and the way back of the gradients.

`parts.py` computes which rows go where; `compact` copies them. A column of weight 0 reaches no
other row of HSTU's pointwise attention, so dropping it changes nothing, provided that positions,
times and 1/n stay those of the full sequence: encode first, compact second.
"""

from torch import Tensor

from hpgr_plugin.ops.dispatch import Backend, Operator, triton_here

__all__ = ["compact"]

_OPERATOR = Operator(
    "compact",
    Backend("triton", f"{__name__}.triton", here=triton_here),
    Backend("torch", f"{__name__}.torch"),
    Backend("naive", f"{__name__}.naive", automatic=False),
)


def compact(
    history: Tensor,
    candidates: Tensor,
    index: Tensor,
    offsets: Tensor,
    *,
    num_rows: int,
    disjoint: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Copy the rows that `index` names, zero beyond the last sequence; never waits for the device.

    Args:
        history: `[T, D]`.
        candidates: `[C, D]`.
        index: integer `[R]`, rows of the history; candidate c is T + c. Unspecified from
            `offsets[-1]` on.
        offsets: int64 `[C + 1]`; short sequence c owns `index[offsets[c]:offsets[c + 1]]`.
        num_rows: rows of the output, at most R; `offsets[-1]` or more.
        disjoint: no history row is named twice, as with one candidate per user: the gradient is
            then stored instead of added up.
        backend: "triton", "torch" or "naive"; None: the fastest that can.

    Returns:
        `[num_rows, D]`.
    """
    rows: Tensor = _OPERATOR(
        history, candidates, index, offsets, num_rows=num_rows, disjoint=disjoint, backend=backend
    )
    return rows
