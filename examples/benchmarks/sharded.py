"""Training steps of stage 1 with a sharded item table, on one and two GPUs.

The batch per GPU is the same, so two GPUs do twice the work of one (weak scaling): the efficiency
is the step time on one over that on two, at best 1. A step is forward, backward, clipping and AdamW
over this GPU's rows, measured for both routings of a sharded table. Without a GPU a small size runs
over gloo.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import io
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing

from examples.benchmarks.registry import check, print_table
from hpgr_plugin.components.mim import MaskedItemModel
from hpgr_plugin.components.sharded_table import Tables
from hpgr_plugin.hosts.embedded.train.shards import clip_gradients, data_parallel
from hpgr_plugin.ops.item_softmax import mean_cross_entropy, sharded_cross_entropy


@dataclasses.dataclass(frozen=True)
class Size:
    """One case: V, D, tokens per process, length of a history, whether all items are scored."""

    items: int
    width: int
    tokens: int
    length: int
    full_softmax: bool
    steps: int = 10


class Measured(NamedTuple):
    """Of the slowest process: milliseconds, bytes at the peak, and the table that ran."""

    step_ms: float
    optimizer_ms: float
    peak_bytes: int
    routing: str


TABLES: tuple[Tables, ...] = ("torchrec", "rows")
Case = tuple[Size, Tables]


GPU_SIZES = (
    Size(200_000, 128, 16_384, 256, full_softmax=True),
    Size(1_000_000, 128, 16_384, 256, full_softmax=False),
    Size(10_000_000, 128, 16_384, 256, full_softmax=False),
)
CPU_SIZES = (
    Size(5_000, 32, 512, 64, full_softmax=True, steps=3),
    Size(20_000, 32, 512, 64, full_softmax=False, steps=3),
)


def run(*, quick: bool) -> None:
    gpus = torch.cuda.device_count()
    sizes = GPU_SIZES if gpus else CPU_SIZES
    sizes = sizes[-1:] if quick else sizes
    counts = [1, 2] if gpus >= 2 or not gpus else [1]
    cases = [(size, tables) for size in sizes for tables in TABLES]
    found = {count: _measure(count, cases) for count in counts}
    rows = []
    for number, (size, _) in enumerate(cases):
        on_one = found[1][number].step_ms
        for count in counts:
            got = found[count][number]
            rows.append(
                {
                    "items": size.items, "D": size.width,
                    "softmax": "all items" if size.full_softmax else "8192 sampled",
                    "GPUs" if gpus else "processes": count, "tokens per process": size.tokens,
                    "tables": got.routing, "step ms": got.step_ms,
                    "of it AdamW ms": got.optimizer_ms, "efficiency": on_one / got.step_ms,
                    "tokens per s": count * size.tokens / got.step_ms * 1e3,
                    "peak GiB per GPU": got.peak_bytes / 2**30 if gpus else "",
                }
            )  # fmt: skip
    print_table(rows)


def _measure(processes: int, cases: Sequence[Case]) -> list[Measured]:
    with socket.socket() as probe, tempfile.TemporaryDirectory() as folder:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
        probe.close()
        path = Path(folder) / "measured.pt"
        multiprocessing.start_processes(
            _work, args=(processes, port, cases, path), nprocs=processes, start_method="spawn"
        )
        return [Measured(*values) for values in torch.load(path)]


def _work(rank: int, processes: int, port: int, cases: Sequence[Case], path: Path) -> None:
    cuda = torch.cuda.is_available()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_RANK": str(rank)}
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        rank=rank,
        world_size=processes,
        init_method=f"tcp://localhost:{port}",
    )
    _check(device)
    measured = [_steps(size, tables, device) for size, tables in cases]
    if rank == 0:
        torch.save([tuple(values) for values in measured], path)
    dist.barrier()
    dist.destroy_process_group()


def _check(device: torch.device) -> None:
    """The loss over shards and its gradients against the loss over the whole table."""
    rank, processes = dist.get_rank(), dist.get_world_size()
    g = torch.Generator(device).manual_seed(0)
    hidden, table = (
        torch.randn(n, 64, generator=g, device=device).requires_grad_() for n in (200, 1001)
    )
    targets = torch.randint(0, 1001, (200,), generator=g, device=device)
    whole = mean_cross_entropy(hidden, table, targets).loss
    wanted = torch.autograd.grad(whole, (hidden, table))
    positions, rows = hidden.detach().tensor_split(processes), -(-1001 // processes)
    first = rank * rows
    own = positions[rank].clone().requires_grad_()
    shard = table.detach()[first : first + rows].clone().requires_grad_()
    start = sum(len(part) for part in positions[:rank])
    here = slice(start, start + len(own))
    got = sharded_cross_entropy(own, shard, targets[here], first_row=first, num_items=1001).loss
    grads = torch.autograd.grad(got / processes, (own, shard))
    with contextlib.redirect_stdout(io.StringIO() if rank else sys.stdout):
        check("loss over shards", got.detach(), whole.detach(), 1e-5)
        check("its gradient of positions", grads[0], wanted[0][here], 1e-3)
        # The table's is the mean over processes of what each sends back.
        wanted_rows = wanted[1][first : first + rows] / processes
        check("its gradient of rows", grads[1], wanted_rows, 1e-3)


def _steps(size: Size, tables: Tables, device: torch.device) -> Measured:
    cuda = device.type == "cuda"
    torch.manual_seed(0)
    if cuda:
        gc.collect()  # the model before
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    model = MaskedItemModel(
        num_items=size.items,
        embedding_dim=size.width,
        max_sequence_length=size.length,
        full_softmax_max_items=size.items if size.full_softmax else 0,
        tables=tables,
    ).to(device)
    forward = data_parallel(model) if dist.get_world_size() > 1 else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=cuda or None)
    batch = _batch(size, device)
    times: list[float] = []
    optimizing: list[float] = []
    for step in range(size.steps + 3):
        start = _now(cuda)
        with torch.autocast("cuda", torch.bfloat16, enabled=cuda):
            loss = forward(*batch, generator=torch.Generator().manual_seed(step)).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        clip_gradients(model, 1.0)
        middle = _now(cuda)
        optimizer.step()
        end = _now(cuda)
        times.append(1e3 * (end - start))
        optimizing.append(1e3 * (end - middle))
    assert torch.isfinite(loss)
    slowest = torch.tensor(
        [statistics.median(times[3:]), statistics.median(optimizing[3:]),
         torch.cuda.max_memory_allocated() if cuda else 0],
        dtype=torch.float64, device=device,
    )  # fmt: skip
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    step_ms, optimizer_ms, peak = slowest.tolist()
    return Measured(step_ms, optimizer_ms, int(peak), type(model.item_table).__name__)


def _batch(size: Size, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Full histories; a few items are frequent, as in a log."""
    g = torch.Generator().manual_seed(dist.get_rank())
    draw = torch.rand(size.tokens, generator=g, dtype=torch.float64)
    items = (size.items * draw**3).long().clamp(max=size.items - 1)
    offsets = torch.arange(0, size.tokens + 1, size.length)
    times = torch.arange(size.length).repeat(len(offsets) - 1) * 300
    return items.to(device), offsets.to(device), times.to(device)


def _now(cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter()
