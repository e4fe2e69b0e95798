"""Peak memory and time of the softmax over all items, chunked and whole.

    python examples/benchmarks/mim_memory.py                          16k masked x 200k items
    python examples/benchmarks/mim_memory.py --whole --masked 2048    the same without chunks

Prints what the process needs on top of its inputs, forward and backward, gradients included (on
CPU the growth of the peak resident size, on CUDA that of the allocator).
"""

from __future__ import annotations

import argparse
import resource
import time

import torch
import torch.nn.functional as F

from hpgr_plugin.ops.item_softmax import mean_cross_entropy

GIB = 1 << 30


def peak_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--masked", type=int, default=16_384)
    parser.add_argument("--items", type=int, default=200_000)
    parser.add_argument("--embedding_dim", type=int, default=64)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--whole", action="store_true", help="hold all logits at once")
    arguments = parser.parse_args()

    def normal(rows: int) -> torch.Tensor:
        shape = (rows, arguments.embedding_dim)
        return torch.randn(shape, device=arguments.device).mul_(0.02).requires_grad_()

    hidden, table = normal(arguments.masked), normal(arguments.items)
    targets = torch.randint(arguments.items, (arguments.masked,), device=arguments.device)
    before, start = peak_bytes(arguments.device), time.perf_counter()
    if arguments.whole:
        loss = F.cross_entropy(hidden @ table.T, targets)
    else:
        loss = mean_cross_entropy(hidden, table, targets).loss
    loss.backward()
    value = loss.item()
    seconds = time.perf_counter() - start
    grown = peak_bytes(arguments.device) - before
    print(
        f"{arguments.masked} masked x {arguments.items} items, D = {arguments.embedding_dim}, "
        f"{'whole' if arguments.whole else 'chunked'}, {arguments.device}: loss {value:.4f}, "
        f"{grown / GIB:.2f} GiB, process peak {peak_bytes(arguments.device) / GIB:.2f} GiB, "
        f"{seconds:.1f} s forward and backward"
    )


if __name__ == "__main__":
    main()
