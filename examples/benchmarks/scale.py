"""What stage 1 with a sharded item table takes: memory, traffic and hours, from sizes and rates.

    python -m examples.benchmarks.scale --items 200000 10000000 1000000000 --gpus 8 64

It calculates and measures nothing; docs/scale.md has the formulas. The rates of a GPU are flags.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace

from examples.benchmarks.registry import print_table

GIB = 2**30
# Measured on two H200 by `python -m examples.benchmarks.registry sharded`, see docs/scale.md.
ENCODER_MS = 25.3  # all but the table: 16,384 tokens, D = 128, 2 layers, 8,192 sampled items
MEMORY_GBS = 1_520.0  # reads and writes of the passes over the table, from 1 to 10 million items
ROUTING_MS = 12.5  # what a second GPU adds to a step whose exchange is small: Python and launches
# Assumptions from data sheets.
PRODUCT_TFLOPS = 300.0  # the products of the softmax over all items
LINK_GBS = 250.0  # per GPU and direction inside a host
NETWORK_GBS = 40.0  # per GPU and direction between hosts


@dataclass(frozen=True)
class Rates:
    """What one GPU does, and how large it is; times 1e9 per second where the name says GBS."""

    encoder_ms: float = ENCODER_MS
    memory_gbs: float = MEMORY_GBS
    routing_ms: float = ROUTING_MS
    product_tflops: float = PRODUCT_TFLOPS
    link_gbs: float = LINK_GBS
    network_gbs: float = NETWORK_GBS
    gpus_per_host: int = 8
    gpu_gib: float = 78.0


@dataclass(frozen=True)
class Workload:
    """One stage 1: V, D, events of the log, tokens per GPU and step, and how items are scored."""

    items: int
    gpus: int
    width: int = 128
    users: int = 45_800_000
    events: int = 285_000_000
    epochs: int = 1
    tokens: int = 16_384
    mask_ratio: float = 0.2
    full_softmax_max_items: int = 200_000
    num_sampled: int = 8_192

    @property
    def masked(self) -> int:
        """M, the items to predict per GPU and step."""
        return round(self.mask_ratio * self.tokens)

    @property
    def is_sampled(self) -> bool:
        return self.items > self.full_softmax_max_items


@dataclass(frozen=True)
class Plan:
    """Per GPU: bytes held, bytes moved in a step and its parts in milliseconds."""

    table_bytes: float
    held_bytes: float
    optimizer_bytes: float
    all_to_all_bytes: float
    softmax_bytes: float
    optimizer_ms: float
    softmax_ms: float
    exchange_ms: float
    step_ms: float
    hours: float
    checkpoint_bytes: float
    log_bytes: float


def plan(work: Workload, rates: Rates) -> Plan:
    """The formulas of docs/scale.md."""
    gpus, width, masked = work.gpus, work.width, work.masked
    shard = -(-work.items // gpus) * width * 4
    elsewhere = (gpus - 1) / gpus
    rows = work.tokens + (masked + work.num_sampled if work.is_sampled else 0)
    all_to_all = rows * (8 + 2 * 4 * width) * elsewhere
    # All items: positions gathered, gradients scattered, in bfloat16; three numbers all-reduced.
    gathered = 0 if work.is_sampled else masked * (gpus - 1) * (2 * 2 * width + 2 * 12)
    flops = 6 * masked * width * (work.num_sampled if work.is_sampled else work.items)
    # Zeros, norm, clipping (read and write); AdamW reads four values of a weight and writes three.
    optimizer_bytes = (1 + 1 + 2 + 7) * shard
    speed = rates.link_gbs if gpus <= rates.gpus_per_host else rates.network_gbs
    optimizer_ms = optimizer_bytes / rates.memory_gbs / 1e6
    softmax_ms = 0.0 if work.is_sampled else flops / rates.product_tflops / 1e9
    exchange_ms = (all_to_all + gathered) / speed / 1e6 + (rates.routing_ms if gpus > 1 else 0.0)
    step_ms = rates.encoder_ms * work.tokens / 16_384 + optimizer_ms + softmax_ms + exchange_ms
    steps = work.epochs * work.events / (gpus * work.tokens)
    return Plan(
        table_bytes=work.items * width * 4,
        # Weight, gradient, two moments, the best weights, and one temporary copy inside AdamW.
        held_bytes=6 * shard,
        optimizer_bytes=optimizer_bytes,
        all_to_all_bytes=all_to_all,
        softmax_bytes=gathered,
        optimizer_ms=optimizer_ms,
        softmax_ms=softmax_ms,
        exchange_ms=exchange_ms,
        step_ms=step_ms,
        hours=steps * step_ms / 3.6e6,
        checkpoint_bytes=4 * work.items * width * 4,
        # item, time, action, label, and the row of a loader, of every event; an offset per user
        log_bytes=work.events * (4 + 8 + 2 + 1 + 8) + work.users * 8,
    )


def row(work: Workload, rates: Rates) -> dict[str, object]:
    got = plan(work, rates)
    fits = got.held_bytes / GIB <= 0.8 * rates.gpu_gib
    return {
        "items": work.items, "GPUs": work.gpus,
        "softmax": f"{work.num_sampled} sampled" if work.is_sampled else "all items",
        "table GiB": got.table_bytes / GIB, "held per GPU GiB": got.held_bytes / GIB,
        "fits": "yes" if fits else "no",
        "AdamW GB per step": got.optimizer_bytes / 1e9,
        "all-to-all MB per step": got.all_to_all_bytes / 1e6,
        "softmax exchange MB": got.softmax_bytes / 1e6,
        "AdamW ms": got.optimizer_ms, "softmax ms": got.softmax_ms,
        "exchange ms": got.exchange_ms, "step ms": got.step_ms,
        "stage-1 hours": got.hours, "checkpoint GiB": got.checkpoint_bytes / GIB,
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--items", type=int, nargs="+", default=[200_000, 1_000_000, 10_000_000, 10**8, 10**9]
    )
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64])
    names = {field: type(value) for field, value in vars(Rates()).items()}
    names |= {n: type(v) for n, v in vars(Workload(1, 1)).items() if n not in ("items", "gpus")}
    for name, kind in names.items():
        parser.add_argument(f"--{name}", type=kind)
    options = vars(parser.parse_args(arguments))
    given = {name: value for name, value in options.items() if value is not None}
    rates = replace(Rates(), **{n: v for n, v in given.items() if n in vars(Rates())})
    sizes = {n: v for n, v in given.items() if n in names and n not in vars(Rates())}
    works = [Workload(v, g, **sizes) for v in options["items"] for g in options["gpus"]]
    print(f"Rates of a GPU (of products and links assumed, unless given as flags): {rates}")
    log = plan(works[0], rates).log_bytes
    print(f"The log of {works[0].events} events: {log / GIB:.1f} GiB in the memory of a process")
    print_table([row(work, rates) for work in works])


if __name__ == "__main__":
    main()
