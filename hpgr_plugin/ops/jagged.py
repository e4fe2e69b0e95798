"""Jagged tensors, (values, offsets) as in fbgemm: the one place that touches `torch.ops.fbgemm`.

Row b of a jagged tensor is `values[offsets[b]:offsets[b + 1]]`; offsets are int32 or int64,
`[B + 1]`, start at 0 and end at the number of rows. fbgemm's operators run where they load and
know the dtype and the device; everywhere else plain torch gives the same values and gradients.
`HPGR_NO_FBGEMM=1` in the environment chooses plain torch.
"""

import functools
import importlib
import importlib.metadata
import logging
import os
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

# torch and fbgemm share an ABI: only these minor versions import together (see setup.cfg).
TORCH_TO_FBGEMM = {"2.11": "1.6", "2.12": "1.7", "2.13": "1.8", "2.14": "1.9"}

_OPERATORS = ("asynchronous_complete_cumsum", "jagged_to_padded_dense", "dense_to_jagged")


def complete_cumsum(lengths: Tensor) -> Tensor:
    """Offsets `[B + 1]` of segments with these lengths `[B]`, in the dtype of the lengths."""
    if _fbgemm_runs("asynchronous_complete_cumsum", lengths.device.type, lengths.dtype):
        return torch.ops.fbgemm.asynchronous_complete_cumsum(lengths.contiguous())
    offsets = lengths.new_zeros(lengths.numel() + 1)
    offsets[1:] = lengths.cumsum(0)
    return offsets


def jagged_to_padded_dense(
    values: Tensor, offsets: Tensor, max_length: int, padding_value: float = 0.0
) -> Tensor:
    """Rows side by side: `[T, ...]` to `[B, max_length, ...]`; longer rows lose their tail.

    Raises:
        ValueError: offsets are not a 1-d int32 or int64 tensor.
    """
    _check_offsets(offsets)
    num_rows, inner = offsets.numel() - 1, values.shape[1:]
    flat = values.reshape(values.shape[0], inner.numel())
    if _fbgemm_runs("jagged_to_padded_dense", values.device.type, values.dtype):
        dense = torch.ops.fbgemm.jagged_to_padded_dense(
            flat, [offsets], [max_length], padding_value
        )
    else:
        dense = _torch_jagged_to_padded_dense(flat, offsets, max_length, padding_value)
    return dense.reshape(num_rows, max_length, *inner)


def dense_to_jagged(dense: Tensor, offsets: Tensor, total_length: int) -> Tensor:
    """The inverse: `[B, N, ...]` to `[T, ...]`; what lies beyond N is zero.

    Raises:
        ValueError: offsets are not a 1-d int32 or int64 tensor.
    """
    _check_offsets(offsets)
    inner = dense.shape[2:]
    flat = dense.reshape(*dense.shape[:2], inner.numel())
    if _fbgemm_runs("dense_to_jagged", dense.device.type, dense.dtype):
        values, _ = torch.ops.fbgemm.dense_to_jagged(flat, [offsets], total_length)
    else:
        values = _torch_dense_to_jagged(flat, offsets, total_length)
    return values.reshape(total_length, *inner)


def segment_ids(offsets: Tensor, total_length: int) -> Tensor:
    """The row that each value belongs to, `[T]` int64: b repeated lengths[b] times."""
    rows = torch.arange(offsets.numel() - 1, device=offsets.device)
    return rows.repeat_interleave(offsets.diff(), output_size=total_length)


def segment_positions(offsets: Tensor, total_length: int) -> Tensor:
    """The place of each value in its row, counted from 0, `[T]` int64."""
    starts = offsets[:-1].long()[segment_ids(offsets, total_length)]
    return torch.arange(total_length, device=offsets.device) - starts


def ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """`arange(start, start + length)` for each of `[R]` pairs, concatenated, int64.

    The flat index that gathers whole rows: `values[ranges(offsets[:-1][rows], lengths[rows])]`.
    """
    offsets = complete_cumsum(lengths.long())
    shift = starts.long() - offsets[:-1]
    shift = shift.repeat_interleave(lengths)
    return torch.arange(shift.numel(), device=starts.device) + shift


def check_sorted(values: Tensor, offsets: Tensor, name: str) -> None:
    """Every row of the jagged values `[T]` must be in ascending order (ties are in order).

    Raises:
        ValueError: naming the argument, the row and the first two values out of order.
    """
    ids = segment_ids(offsets, values.numel())
    descends = (values[1:] < values[:-1]) & (ids[1:] == ids[:-1])
    if bool(descends.any()):
        at = int(descends.nonzero()[0, 0]) + 1
        raise ValueError(
            f"{name} must ascend in every row, but in row {int(ids[at])} the value at flat "
            f"position {at} is {values[at].item()} after {values[at - 1].item()}"
        )


def _check_offsets(offsets: Tensor) -> None:
    if (
        offsets.dim() != 1
        or offsets.numel() == 0
        or offsets.dtype not in (torch.int32, torch.int64)
    ):
        raise ValueError(
            f"offsets must be an int32 or int64 tensor [B + 1], got {offsets.dtype} "
            f"of shape {list(offsets.shape)}"
        )


def _torch_jagged_to_padded_dense(
    values: Tensor, offsets: Tensor, max_length: int, padding_value: float
) -> Tensor:
    total, width = values.shape
    num_rows = offsets.numel() - 1
    rows, places = segment_ids(offsets, total), segment_positions(offsets, total)
    # Tails that do not fit all go to one slot past the end, which is cut off again: no
    # data-dependent shape, so no wait for the device.
    slots = num_rows * max_length
    target = torch.where(places < max_length, rows * max_length + places, slots)
    dense = values.new_full((slots + 1, width), padding_value).index_copy(0, target, values)
    return dense[:slots].view(num_rows, max_length, width)


def _torch_dense_to_jagged(dense: Tensor, offsets: Tensor, total_length: int) -> Tensor:
    num_rows, max_length, width = dense.shape
    if max_length == 0:
        return dense.new_zeros(total_length, width)
    rows, places = segment_ids(offsets, total_length), segment_positions(offsets, total_length)
    index = rows * max_length + places.clamp(max=max_length - 1)
    values = dense.reshape(num_rows * max_length, width)[index]
    return torch.where((places < max_length).unsqueeze(1), values, values.new_zeros(()))


@functools.cache
def _fbgemm_runs(operator: str, device_type: str, dtype: torch.dtype) -> bool:
    """Whether fbgemm has this operator, with its gradient, for this device and dtype.

    Asked of fbgemm itself by one tiny call: a CPU build has no CUDA kernels, and no build has
    float64 on every device.
    """
    if not _load_fbgemm():
        return False
    probes: dict[str, Callable[[Tensor], Tensor]] = {
        "asynchronous_complete_cumsum": lambda x: torch.ops.fbgemm.asynchronous_complete_cumsum(
            x.reshape(1)
        ),
        "jagged_to_padded_dense": lambda x: torch.ops.fbgemm.jagged_to_padded_dense(
            x, [offsets], [1], 0.0
        ),
        "dense_to_jagged": lambda x: torch.ops.fbgemm.dense_to_jagged(x.unsqueeze(0), [offsets], 1)[
            0
        ],
    }
    try:
        # The first call may come from inference, and the answer has to hold for training too.
        with torch.inference_mode(False), torch.enable_grad():
            offsets = torch.tensor([0, 1], device=device_type)
            probe = torch.ones(1, 1, device=device_type, dtype=dtype)
            output = probes[operator](probe.requires_grad_(dtype.is_floating_point))
            if output.requires_grad:
                output.sum().backward()
    except RuntimeError:  # NotImplementedError is one
        return False
    return True


@functools.cache
def _load_fbgemm() -> bool:
    """Import fbgemm on first use; where it does not come, say once which versions match."""
    if os.environ.get("HPGR_NO_FBGEMM") == "1":
        return False
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    try:
        importlib.import_module("fbgemm_gpu")
        for operator in _OPERATORS:
            getattr(torch.ops.fbgemm, operator)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        warnings.warn(_no_fbgemm_message(error), stacklevel=2)
        return False
    finally:
        # The import changes the root logger, and with it what the host prints.
        root.setLevel(level)
        root.handlers[:] = handlers
    return True


def _no_fbgemm_message(error: Exception) -> str:
    pairs = ", ".join(f"torch {t} with fbgemm {f}" for t, f in TORCH_TO_FBGEMM.items())
    found = "no fbgemm is installed"
    for name in ("fbgemm-gpu", "fbgemm-gpu-cpu"):
        try:
            found = f"{name} {importlib.metadata.version(name)} does not load ({error})"
        except importlib.metadata.PackageNotFoundError:
            continue
    return (
        f"jagged operators run in plain torch: {found}. torch here is {torch.__version__}; "
        f"versions that match: {pairs}. HPGR_NO_FBGEMM=1 silences this."
    )
