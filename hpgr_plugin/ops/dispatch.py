"""What every choice between a kernel and plain torch needs."""

import functools
import importlib.util
import warnings

import torch


@functools.cache
def triton_is_installed() -> bool:
    """Whether Triton can be imported; it is not imported to find out."""
    return importlib.util.find_spec("triton") is not None


def dot_precision(dtype: torch.dtype, device: torch.device) -> str:
    """Triton's `input_precision` for products of this dtype, as torch's own setting wants it."""
    if dtype != torch.float32 or device.type != "cuda":
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def warn_once(message: str) -> None:
    """Say it the first time in this process, whatever the warning filters keep."""
    _warn_cached(message)


@functools.cache
def _warn_cached(message: str) -> None:
    warnings.warn(message, stacklevel=4)
