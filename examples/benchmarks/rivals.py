"""Stochastic length, and PGSA without a kernel of its own, on the host's kernels only.

Against the host's dense stack, as in `stack`. Lengths are divisible by 16 where they can be: see
NOTES.md.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.benchmarks import host
from examples.benchmarks.registry import measure_ceilings, print_table
from examples.benchmarks.stack import (
    LAYERS,
    SETTINGS,
    WIDTH,
    Batch,
    attention_flops,
    dense_work,
    host_times,
    linear_flops,
    name_of,
    new_stack,
    pgsa_work,
    row_of,
    step_times,
)

_ALIGNED = 16


def run(*, quick: bool) -> None:
    if not host.is_there():
        print("no host checkout on PYTHONPATH: nothing to measure")
        return
    ceilings = measure_ceilings()
    host.stand_in()
    host.compile_in_parallel(12, ("dense", "weighted"))
    host.prepare_tuning()
    keep = None
    for length in (4096, 1024) if quick else (4096, 1024, 16384):
        dense_host = host.HostStack(new_stack(length))
        for tokens in (131072, 1048576):
            # All configurations are timed once, the best of them ever after.
            host.forget_attention(keep=keep)
            keep = 4
            batch = Batch(tokens, length)
            whole = batch.whole()
            base = host_times(dense_host, batch, whole)
            timed = [("dense host", base, tokens, dense_work(batch))]
            for alpha in (1.6, 1.8):
                timed.append(_stochastic_length(dense_host, batch, alpha, whole))
            print_table([row_of(batch, *row, base, ceilings) for row in timed])
            timed = [_pgsa(dense_host, batch, setting) for setting in SETTINGS[1:]]
            print_table([row_of(batch, *row, base, ceilings) for row in timed])
            del batch, whole
            torch.cuda.empty_cache()


_Timed = tuple[str, tuple[float, float, float], int, dict[str, float]]


def _pgsa(dense_host: host.HostStack, batch: Batch, setting: tuple[int, float, int]) -> _Timed:
    def step() -> Tensor:
        chosen = batch.select(setting)
        kept = int(chosen.offsets[-1])
        # A last sequence whose output is unused makes the number of rows divisible by 16.
        filled = -(-kept // _ALIGNED) * _ALIGNED
        rows = batch.gather(chosen, filled)
        offsets = F.pad(chosen.offsets, (0, 1), value=filled)
        weights = F.pad(chosen.weights[:kept], (0, filled - kept))
        output = dense_host.weighted(rows, weights, offsets, max_length=chosen.max_length)
        return output[chosen.offsets[1:] - 1]

    inputs = [batch.history, batch.candidates, *dense_host.parameters()]
    times = step_times(step, inputs, batch.grad)
    chosen = batch.select(setting)
    name = f"{name_of(setting)}, host's kernels"
    return name, times, int(chosen.offsets[-1]), pgsa_work(batch, chosen)


def _stochastic_length(
    dense_host: host.HostStack, batch: Batch, alpha: float, whole: Tensor
) -> _Timed:
    """The most recent N^(alpha/2) of a long history, but whole with probability N^(alpha - 2)."""
    n = batch.length
    short = int(n ** (alpha / 2)) // _ALIGNED * _ALIGNED
    kept_whole = round(n ** (alpha - 2) * batch.users)
    lengths = torch.where(torch.arange(batch.users, device="cuda") < kept_whole, n, short)
    offsets = F.pad(lengths.cumsum(0), (1, 0))
    total = int(offsets[-1])
    users = torch.repeat_interleave(lengths, output_size=total)
    place = torch.arange(total, device="cuda") - offsets[:-1][users]
    index = batch.offsets[1:][users] - lengths[users] + place
    step = _shortened(dense_host, batch, whole, index, offsets)
    times = step_times(step, [whole, *dense_host.parameters()], batch.grad)
    squares = float(lengths.double().square().sum())
    flops = 3 * linear_flops(total, LAYERS) + 3.5 * attention_flops(squares, LAYERS)
    work = {"flops": flops, "num_bytes": 2.0 * WIDTH * (total + batch.users * n)}
    return f"stochastic length {alpha}, host", times, total, work


def _shortened(
    dense_host: host.HostStack, batch: Batch, whole: Tensor, index: Tensor, offsets: Tensor
) -> Callable[[], Tensor]:
    form = {"max_length": batch.length, "num_targets": batch.num_targets}

    def step() -> Tensor:
        output = dense_host.dense(whole.index_select(0, index), offsets, **form)
        return output[offsets[1:] - 1]

    return step
