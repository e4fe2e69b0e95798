"""What one training step costs on the device."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch


class StepCost(NamedTuple):
    """Median wall ms, ms in which a kernel runs, kernels, and peak GiB of a step."""

    wall_ms: float
    busy_ms: float
    launches: int
    peak_gib: float

    def columns(self) -> dict[str, object]:
        """The cells of a table."""
        return {
            "wall ms": self.wall_ms,
            "busy ms": self.busy_ms,
            "launches": self.launches,
            "peak GiB": self.peak_gib,
        }


def measure_step(step: Callable[[], object], *, steps: int = 15, warmup: int = 5) -> StepCost:
    """Run a step until it is compiled and tuned, then measure it; the profiled step is one more."""
    for _ in range(warmup):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    peak = torch.cuda.max_memory_allocated() / 2**30
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    busy = sum(e.device_time for e in kernels) / 1e3
    return StepCost(statistics.median(times), busy, len(kernels), peak)
