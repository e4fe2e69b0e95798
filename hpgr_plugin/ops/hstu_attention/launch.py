"""The launch that the plain and the general kernels share."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hpgr_plugin.ops.dispatch import dot_precision
from hpgr_plugin.ops.hstu_attention.spec import AttentionSpec


class Blocks(NamedTuple):
    """Sizes of one program: rows, columns, warps and the depth of the load pipeline."""

    rows: int
    columns: int
    warps: int
    stages: int


def launch(
    kernel: Any,
    num_blocks: int,
    tensors: tuple[Tensor, ...],
    arguments: tuple[Tensor | int, ...],
    spec: AttentionSpec,
    blocks: Blocks,
    **constants: Any,
) -> None:
    """Run a kernel on `num_blocks` blocks of every head of every sequence.

    Args:
        kernel: of `kernels.py` or `general_kernels.py`.
        num_blocks: of the longest sequence.
        tensors: `[T, H, d]`, q, k and v first; they come first in the kernel, and their strides
            behind `arguments`.
        arguments: of the sequences, in kernel order.
        spec: of the sequences.
        blocks: of one program.
        **constants: of this kernel, beside those that all have.
    """
    q, v = tensors[0], tensors[2]
    programs = num_blocks * (spec.offsets.numel() - 1) * q.shape[1]
    if programs == 0:
        return
    kernel[(programs,)](
        *tensors,
        *arguments,
        *(stride for x in tensors for stride in (x.stride(0), x.stride(1))),
        num_blocks,
        spec.alpha,
        1.0 / spec.norm_length,
        **constants,
        H=q.shape[1],
        D=q.shape[2],
        DV=v.shape[2],
        ROWS=blocks.rows,
        COLUMNS=blocks.columns,
        SUFFIX=spec.query_offsets is not None,
        MATRIX=spec.row_weights is not None,
        APPROXIMATE=q.is_cuda and q.dtype != torch.float32,
        PRECISION=dot_precision(q.dtype, q.device),
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
