"""How long, and in how much memory, a log of many events is prepared.

    python examples/benchmarks/prepare.py --events 10000000 --format parquet

Writes a random log of that size, prepares it in a fresh process through the cache, makes the
requests of all splits and gathers some batches, and prints seconds and peak memory.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as arrow_csv
import pyarrow.parquet as arrow_parquet

import hpgr_plugin.data as data


def write_log(path: Path, num_events: int) -> None:
    """Users and items of very different activity, a year of seconds, in the order of time."""
    random = np.random.default_rng(0)
    num_users, num_items = max(1, num_events // 100), max(1, num_events // 50)
    table = pa.table(
        {
            "user_id": (random.random(num_events) ** 2 * num_users).astype(np.int64) * 7 + 13,
            "item_id": (random.random(num_events) ** 3 * num_items).astype(np.int64) * 3 + 5,
            "timestamp": 1_600_000_000 + np.sort(random.integers(0, 365 * 86400, num_events)),
            "rating": random.integers(1, 6, num_events),
        }
    )
    if path.suffix == ".csv":
        arrow_csv.write_csv(table, path)
    else:
        arrow_parquet.write_table(table, path)


class Stopwatch:
    """Prints wall and processor seconds, and the peak of memory so far, step by step."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        self._start = self._wall, self._cpu

    def step(self, name: str) -> None:
        """Everything since the last step was `name`."""
        self._print(name, self._wall, self._cpu)
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def total(self) -> None:
        """Everything since the start."""
        self._print("total", *self._start)

    @staticmethod
    def _print(name: str, wall: float, cpu: float) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        print(f"{name:32s} {wall:7.1f} s  {cpu:7.1f} cpu s  peak {peak:5.2f} GiB", flush=True)


def prepare(path: Path, cache: Path) -> None:
    """Prepares the log and says what each step took."""
    watch = Stopwatch()
    settings = {
        "reader": data.TableReader(path=str(path)),
        "label": data.rating_at_least(4.0),
        "action": "rating",
        "split": data.GlobalTimeSplit(),
        "cache_dir": str(cache),
    }
    prepared = data.prepare_data(**settings)
    watch.step("prepare: read, sort, split, store")
    print(f"  {prepared.log.num_events:,} events, {prepared.log.num_users:,} users", end=", ")
    print(f"{prepared.log.num_items:,} items")
    loaders = {}
    for split in ("train", "validation", "test"):
        loaders[split] = data.RequestLoader(
            prepared=prepared,
            split=split,
            settings=data.RequestSettings(request_span_seconds=3600),
        )
    watch.step("requests of all splits")
    watch.total()
    batches = loaders["train"].batches()
    next(batches)
    watch.step("first training batch")
    tokens = sum(b.history_items.numel() + b.num_candidates for b in islice(batches, 200))
    watch.step(f"200 more, {tokens:,} tokens")
    data.prepare_data(**settings)
    watch.step("prepare again, from the cache")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--events", type=int, default=10_000_000)
    parser.add_argument("--format", choices=["parquet", "csv"], default="parquet")
    parser.add_argument("--prepare", type=Path, help="prepare this file instead of writing one")
    arguments = parser.parse_args()
    if arguments.prepare:
        prepare(arguments.prepare, arguments.prepare.parent / "cache")
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"log.{arguments.format}"
        write_log(path, arguments.events)
        print(f"{path.name}: {path.stat().st_size / 2**20:.0f} MiB", flush=True)
        # A process of its own: writing the log is no part of the memory.
        command = [sys.executable, __file__, "--prepare", str(path)]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
