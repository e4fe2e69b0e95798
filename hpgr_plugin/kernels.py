"""What every choice between a kernel and plain torch needs."""

import functools
import importlib.util
import warnings


@functools.cache
def triton_is_installed() -> bool:
    """Whether Triton can be imported; it is not imported to find out."""
    return importlib.util.find_spec("triton") is not None


def warn_once(message: str) -> None:
    """Say it the first time in this process, whatever the warning filters keep."""
    _warn_cached(message)


@functools.cache
def _warn_cached(message: str) -> None:
    warnings.warn(message, stacklevel=4)
