"""What one training step costs on the device."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch


class StepCost(NamedTuple):
    """Median wall ms, ms in which a kernel runs, kernels, and peak GiB of a step.

    The peak is of allocated memory; `reserved_gib` is what the process took from the device for
    it, the pools of CUDA graphs among it.
    """

    wall_ms: float
    busy_ms: float
    launches: int
    peak_gib: float
    reserved_gib: float

    def columns(self) -> dict[str, object]:
        """The cells of a table."""
        return {
            "wall ms": self.wall_ms,
            "busy ms": self.busy_ms,
            "launches": self.launches,
            "peak GiB": self.peak_gib,
            "reserved GiB": self.reserved_gib,
        }


def measure_step(step: Callable[[], object], *, steps: int = 15, warmup: int = 5) -> StepCost:
    """Run a step until it is compiled and tuned, then measure it; the profiled step is one more."""
    for _ in range(warmup):
        step()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # what compiling and tuning took
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    busy, launches = profile_kernels(step)
    return StepCost(statistics.median(times), busy, launches, peak / 2**30, reserved / 2**30)


def profile_kernels(step: Callable[[], object]) -> tuple[float, int]:
    """The ms in which kernels of a step run, and how many they are."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return sum(e.device_time for e in kernels) / 1e3, len(kernels)
