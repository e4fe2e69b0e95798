"""Jagged operators of fbgemm: the one module that touches `torch.ops.fbgemm`."""

import functools
import importlib
import importlib.metadata
import logging
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

# torch and fbgemm share an ABI: only these minor versions import together (see setup.cfg).
TORCH_TO_FBGEMM = {"2.11": "1.6", "2.12": "1.7", "2.13": "1.8", "2.14": "1.9"}


def complete_cumsum(lengths: Tensor) -> Tensor:
    """Offsets of lengths `[B]`."""
    offsets: Tensor = torch.ops.fbgemm.asynchronous_complete_cumsum(lengths.contiguous())
    return offsets


def jagged_to_padded_dense(
    values: Tensor, offsets: Tensor, max_length: int, padding_value: float
) -> Tensor:
    """`[T, D]` to `[B, max_length, D]`; values past the last row are left out."""
    dense: Tensor = torch.ops.fbgemm.jagged_to_padded_dense(
        _zero_past_the_last_row(values, offsets), [offsets], [max_length], padding_value
    )
    return dense


def dense_to_jagged(dense: Tensor, offsets: Tensor, total_length: int) -> Tensor:
    """`[B, N, D]` to `[T, D]`; values past the last row are zero."""
    values: Tensor = torch.ops.fbgemm.dense_to_jagged(dense, [offsets], total_length)[0]
    return _zero_past_the_last_row(values, offsets)


def _zero_past_the_last_row(values: Tensor, offsets: Tensor) -> Tensor:
    """fbgemm on CUDA leaves values, and gradients, that no row owns as the memory was."""
    owned = torch.arange(len(values), device=offsets.device) < offsets[-1]
    return torch.where(owned.unsqueeze(1), values, values.new_zeros(()))


# One tiny call for each operator: `offsets` are [0, 1], `one` is [1, 1].
_PROBES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "complete_cumsum": lambda one, _: complete_cumsum(one.reshape(1)),
    "jagged_to_padded_dense": lambda one, offsets: jagged_to_padded_dense(one, offsets, 1, 0.0),
    "dense_to_jagged": lambda one, offsets: dense_to_jagged(one.unsqueeze(0), offsets, 1),
}


@functools.cache
def _why_not(operator: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Why fbgemm lacks this operator or its gradient for this device and dtype, or None.

    A call decides: a CPU build has no CUDA kernels, and no build has float64 on every device.
    """
    try:
        # The first call may come from inference, and the answer has to hold for training too.
        with torch.inference_mode(False), torch.enable_grad():
            offsets = torch.tensor([0, 1], device=device_type)
            one = torch.ones(1, 1, device=device_type, dtype=dtype)
            output = _PROBES[operator](one.requires_grad_(dtype.is_floating_point), offsets)
            if output.requires_grad:
                output.sum().backward()
    except RuntimeError:  # NotImplementedError is one
        return f"{operator} does not support {dtype} on {device_type}"
    return None


def _why_not_of(operator: str) -> Callable[..., str | None]:
    return lambda values, *_: _why_not(operator, values.device.type, values.dtype)


why_not_complete_cumsum = _why_not_of("complete_cumsum")
why_not_jagged_to_padded_dense = _why_not_of("jagged_to_padded_dense")
why_not_dense_to_jagged = _why_not_of("dense_to_jagged")


@functools.cache
def fbgemm_here() -> str | None:
    """Import fbgemm on first use; where that fails, warn and return the reason."""
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    try:
        importlib.import_module("fbgemm_gpu")
        for name in ("asynchronous_complete_cumsum", "jagged_to_padded_dense", "dense_to_jagged"):
            getattr(torch.ops.fbgemm, name)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        reason = _what_was_found(error)
        warnings.warn(_advice(reason), stacklevel=2)
        return reason
    finally:
        # The import changes the root logger, and with it what the host prints.
        root.setLevel(level)
        root.handlers[:] = handlers
    return None


def _what_was_found(error: Exception) -> str:
    for name in ("fbgemm-gpu", "fbgemm-gpu-cpu"):
        try:
            return f"{name} {importlib.metadata.version(name)} does not load ({error})"
        except importlib.metadata.PackageNotFoundError:
            continue
    return "no fbgemm is installed"


def _advice(reason: str) -> str:
    pairs = ", ".join(f"torch {t} with fbgemm {f}" for t, f in TORCH_TO_FBGEMM.items())
    return (
        f"jagged operators run in plain torch: {reason}. torch here is {torch.__version__}; "
        f'versions that match: {pairs}. HPGR_BACKENDS="jagged=torch" silences this.'
    )
