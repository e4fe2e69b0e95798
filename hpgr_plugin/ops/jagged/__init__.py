"""Jagged tensors, (values, offsets) as in fbgemm.

Row b of a jagged tensor is `values[offsets[b]:offsets[b + 1]]`; offsets are int32 or int64,
`[B + 1]`, start at 0 and end at the number of rows, or before it: values that no row owns are left
out of a dense tensor and come back as zero. fbgemm's operators run where they load and
support the dtype and the device; everywhere else plain torch gives the same values and gradients.
`HPGR_BACKENDS="jagged=torch"` chooses plain torch without loading fbgemm.
"""

from torch import Tensor
from torch import int32 as _int32
from torch import int64 as _int64

from hpgr_plugin.ops.dispatch import Backend, Operator
from hpgr_plugin.ops.jagged.fbgemm import fbgemm_here
from hpgr_plugin.ops.jagged.segments import (
    check_sorted,
    lead_with,
    ranges,
    segment_ids,
    segment_positions,
)

__all__ = [
    "check_sorted",
    "complete_cumsum",
    "dense_to_jagged",
    "jagged_to_padded_dense",
    "lead_with",
    "ranges",
    "segment_ids",
    "segment_positions",
]

_OPERATOR = Operator(
    "jagged",
    Backend("fbgemm", f"{__name__}.fbgemm", here=fbgemm_here, warns=False),
    Backend("torch", f"{__name__}.torch"),
    Backend("naive", f"{__name__}.naive", automatic=False),
)


def complete_cumsum(lengths: Tensor) -> Tensor:
    """Offsets `[B + 1]` of segments with these lengths `[B]`, in the dtype of the lengths."""
    offsets: Tensor = _OPERATOR.run("complete_cumsum", lengths)
    return offsets


def jagged_to_padded_dense(
    values: Tensor, offsets: Tensor, max_length: int, padding_value: float = 0.0
) -> Tensor:
    """Rows side by side: `[T, ...]` to `[B, max_length, ...]`; longer rows lose their tail.

    Raises:
        ValueError: offsets are not a 1-d int32 or int64 tensor.
    """
    _check_offsets(offsets)
    inner = values.shape[1:]
    flat = values.reshape(values.shape[0], inner.numel())
    dense: Tensor = _OPERATOR.run(
        "jagged_to_padded_dense", flat, offsets, max_length, padding_value
    )
    return dense.reshape(offsets.numel() - 1, max_length, *inner)


def dense_to_jagged(dense: Tensor, offsets: Tensor, total_length: int) -> Tensor:
    """The inverse: `[B, N, ...]` to `[T, ...]`; what lies beyond N is zero.

    Raises:
        ValueError: offsets are not a 1-d int32 or int64 tensor.
    """
    _check_offsets(offsets)
    inner = dense.shape[2:]
    flat = dense.reshape(*dense.shape[:2], inner.numel())
    values: Tensor = _OPERATOR.run("dense_to_jagged", flat, offsets, total_length)
    return values.reshape(total_length, *inner)


def _check_offsets(offsets: Tensor) -> None:
    if offsets.dim() != 1 or offsets.numel() == 0 or offsets.dtype not in (_int32, _int64):
        raise ValueError(
            f"offsets must be an int32 or int64 tensor [B + 1], got {offsets.dtype} "
            f"of shape {list(offsets.shape)}"
        )
