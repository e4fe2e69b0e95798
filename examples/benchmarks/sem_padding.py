"""How much of what SEM attends to is padding, on MovieLens-1M.

    python examples/benchmarks/sem_padding.py path/to/ml-1m/ratings.dat

Prints, for both encoders of SEM, the share of attention slots that are padding when sessions are
bucketed by length as SEM does it, and when a batch is padded to its longest session. Nothing but
attention is padded: linear layers and norms run on flat tokens.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor

from hpgr_plugin.components.sessions import partition_sessions
from hpgr_plugin.ops.jagged import complete_cumsum, ranges
from hpgr_plugin.ops.segments import segment_layout


def read_times(path: Path) -> list[Tensor]:
    """Ascending timestamps of every user of a `user::item::rating::timestamp` file."""
    times = defaultdict(list)
    with path.open(encoding="latin-1") as lines:
        for line in lines:
            user, _, _, timestamp = line.rstrip("\n").split("::")
            times[user].append(int(timestamp))
    return [torch.tensor(sorted(history)) for history in times.values()]


class Padding:
    """Slots of attention over segments, summed over batches."""

    def __init__(self) -> None:
        self.real = self.bucketed = self.to_longest = self.buckets = self.batches = 0

    def add(self, lengths: Tensor) -> None:
        layout = segment_layout(complete_cumsum(lengths))
        self.real += int(lengths.sum())
        self.bucketed += layout.num_slots
        self.to_longest += len(lengths) * int(lengths.max())
        self.buckets += len(layout.buckets)
        self.batches += 1

    def __str__(self) -> str:
        return (
            f"{1 - self.real / self.bucketed:.1%} of the slots are padding in "
            f"{self.buckets / self.batches:.1f} buckets a batch "
            f"({1 - self.real / self.to_longest:.1%} if padded to the longest)"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("ratings", type=Path)
    parser.add_argument("--gap_seconds", type=int, default=1800)
    parser.add_argument("--batch_size", type=int, nargs="+", default=[64, 512])
    arguments = parser.parse_args()

    histories = read_times(arguments.ratings)
    timestamps = torch.cat(histories)
    offsets = complete_cumsum(torch.tensor([len(history) for history in histories]))
    sessions = partition_sessions(timestamps, offsets, arguments.gap_seconds)
    lengths = sessions.session_offsets.diff()
    print(
        f"{len(timestamps)} tokens, {len(histories)} users, {len(lengths)} sessions, "
        f"longest {int(lengths.max())} tokens"
    )
    for batch_size in arguments.batch_size:
        shuffled = torch.randperm(len(histories), generator=torch.Generator().manual_seed(0))
        intra, inter = Padding(), Padding()
        for users in shuffled.split(batch_size):
            counts = sessions.user_offsets.diff()[users]
            intra.add(lengths[ranges(sessions.user_offsets[:-1][users], counts)] + 1)  # and [CLS]
            inter.add(counts + 1)
        print(f"batches of {batch_size} users")
        print(f"  inside sessions:  {intra}")
        print(f"  over sessions:    {inter}")


if __name__ == "__main__":
    main()
