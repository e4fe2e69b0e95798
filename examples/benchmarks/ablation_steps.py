"""Seconds per training step of every row of an ablation, one row at a time, in one run.

    python -m examples.benchmarks.ablation_steps --config configs/runs/ml-1m_ablation.gin

The rows of a table trained side by side disturb each other's clock; these do not. Each row trains
from random weights on the same batches: a stage 1 changes the time of nothing.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time

import gin
import torch
import torch.nn.functional as F

from hpgr_plugin.cli import load_configs
from hpgr_plugin.data.batch import Batch
from hpgr_plugin.data.batches import RequestLoader
from hpgr_plugin.data.prepare import prepare_data
from hpgr_plugin.data.prepared import PreparedData
from hpgr_plugin.hosts.embedded.report.ablation import RowSettings
from hpgr_plugin.hosts.embedded.train.distributed import process_group, seed_everything
from hpgr_plugin.hosts.embedded.train.stages import build_ranker


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/runs/quickstart.gin")
    parser.add_argument("--gin_bindings", action="append", default=[])
    parser.add_argument("--steps", type=int, default=12)
    arguments = parser.parse_args()
    load_configs([arguments.config], arguments.gin_bindings)
    rows = gin.query_parameter("hpgr.run.rows")
    with process_group() as process:
        data = prepare_data()
        loader = RequestLoader(prepared=data, split="train")
        batches = list(itertools.islice(loader.batches(), arguments.steps))
        reference = None
        print(f"{'row':55} {'s/step':>8} {'vs first':>9} {'peak GiB':>9}")
        for row in rows:
            with gin.config_scope(row):
                title = RowSettings().title
                seconds, peak = time_row(data, batches, process.device)
            reference = reference or seconds
            print(f"{title:55} {seconds:8.4f} {reference / seconds:8.2f}x {peak:9.2f}")


def time_row(data: PreparedData, batches: list[Batch], device: torch.device) -> tuple[float, float]:
    """Median seconds per step of the row whose gin scope is open, and peak GiB on CUDA.

    A first pass over the same batches warms up: it meets every shape once.
    """
    seed_everything(0)
    model = build_ranker(data).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters())
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    times = []
    for batch in [*batches, *batches]:
        start = time.perf_counter()
        moved = batch.to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=cuda):
            logits = model(moved)
        loss = F.binary_cross_entropy_with_logits(logits.float(), moved.candidate_labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
    return statistics.median(times[len(batches) :]), peak


if __name__ == "__main__":
    main()
