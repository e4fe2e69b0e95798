"""Where the kernel tests run: on the GPU where there is one, else in Triton's interpreter.

Import this before any module with kernels: the interpreter is chosen when Triton is imported.
"""

import os

import pytest
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

pytest.importorskip("triton", reason="triton is not installed")


def offsets_of(lengths: list[int], dtype: torch.dtype = torch.int64) -> Tensor:
    """`[B + 1]` of rows of these lengths."""
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return torch.tensor([0, *ends], dtype=dtype, device=DEVICE)
