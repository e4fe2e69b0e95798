"""Where the kernel tests run: on the GPU where there is one, else in Triton's interpreter.

Import this before any module with kernels: the interpreter is chosen when Triton is imported.
"""

import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

pytest.importorskip("triton", reason="triton is not installed")
