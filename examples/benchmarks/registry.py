"""The benchmarks by name, and what they share: timing, ceilings of the device, tables.

    python -m examples.benchmarks.registry stack plan --quick

Every benchmark checks its results before it times anything, and prints one table of what it
measured in that run. With a host checkout on PYTHONPATH the host's own kernels are measured too.
"""

import argparse
import importlib
import itertools
import multiprocessing
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import torch

NAMES = (
    *("hosts", "embedded", "serving", "kernels", "plan", "stack", "rivals", "candidates"),
    *("growth", "sem", "mim", "sharded", "slates", "cpu"),
)


class Ceilings(NamedTuple):
    """What the device does at most, measured in this run."""

    bytes_per_s: float
    flops_per_s: float

    def lower_bound_ms(self, *, num_bytes: float, flops: float) -> float:
        """The larger of the times that moving the bytes and computing take at least."""
        return 1e3 * max(num_bytes / self.bytes_per_s, flops / self.flops_per_s)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=None, help=f"of {', '.join(NAMES)}")
    parser.add_argument("--quick", action="store_true", help="fewer sizes")
    options = parser.parse_args(arguments)
    names = options.names or [
        n for n in NAMES if n in ("cpu", "serving", "slates") or torch.cuda.is_available()
    ]
    for name in names:
        if name not in NAMES:
            parser.error(f"no benchmark {name!r}; there are {', '.join(NAMES)}")
    if len(names) > 1:
        return _each_by_itself(names, quick=options.quick)
    importlib.import_module(f"examples.benchmarks.{names[0]}").run(quick=options.quick)
    return 0


def _each_by_itself(names: Sequence[str], *, quick: bool) -> int:
    """One process each, so that memory or a fault left by one does not reach the next."""
    failed = 0
    for name in names:
        start = time.time()
        print(f"\n## {name}\n", flush=True)
        command = [sys.executable, "-m", "examples.benchmarks.registry", name]
        failed += subprocess.run([*command, *(["--quick"] * quick)]).returncode != 0
        print(f"\n({name}: {time.time() - start:.0f} s)", flush=True)
    return failed


def time_ms(step: Callable[[], object], *, budget_ms: float = 150.0, most: int = 30) -> float:
    """Median time per step on the device, by events; on the CPU, by the clock."""
    if not torch.cuda.is_available():
        return _time_cpu_ms(step, budget_ms=budget_ms, most=most)
    step()
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    end.record()
    torch.cuda.synchronize()
    repeats = int(min(most, max(2, budget_ms // max(1e-3, start.elapsed_time(end)))))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks))


def _time_cpu_ms(step: Callable[[], object], *, budget_ms: float, most: int) -> float:
    step()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < budget_ms and len(times) < most):
        start = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def measure_ceilings() -> Ceilings:
    """Time a large copy (bytes read plus written) and a large bfloat16 matrix product."""
    source = torch.randn(2**29, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    copy_ms = time_ms(lambda: target.copy_(source))
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    product_ms = time_ms(lambda: torch.mm(a, b))
    ceilings = Ceilings(2 * 2 * source.numel() / copy_ms * 1e3, 2 * 8192**3 / product_ms * 1e3)
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}: copy "
        f"{ceilings.bytes_per_s / 1e12:.2f} TB/s, bfloat16 product "
        f"{ceilings.flops_per_s / 1e12:.0f} TFLOP/s"
    )
    return ceilings


def in_parallel(job: Callable[[str], None], names: Sequence[str], processes: int = 12) -> None:
    """Run a job for every name, each in a process of its own: kernels compile one by one.

    Raises:
        AssertionError: from the first job that failed.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(processes, len(names)), mp_context=context) as pool:
        list(pool.map(job, names))


def check(name: str, got: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    """Check the relative error in the norm, so that no wrong result is timed.

    Raises:
        AssertionError: it is above the tolerance, or not a number.
    """
    error = relative_error(got, wanted)
    print(f"check {name}: relative error {error:.1e} (at most {tolerance:.0e})", flush=True)
    assert error <= tolerance, f"{name}: {error} > {tolerance}"


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def print_table(rows: Sequence[dict[str, object]]) -> None:
    """Print Markdown, one column per key, in the order in which keys appear."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    print("\n| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(_cell(row.get(column, "")) for column in columns) + " |")
    sys.stdout.flush()


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if value < 100 else f"{value:.0f}"
    return str(value)


if __name__ == "__main__":
    sys.exit(main())
