"""The stage-1 hand-over in the host's embedding collection, whole or sharded."""

import os
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hpgr_plugin.transfer.handoff import Handoff, HandoffError, load_handoff, read_header

# An attribute of the parameter: it stays where names change, and a patched host reads it too.
_LR_SCALE = "lr_scale"
_ITEM_IDS = "item_ids"


def mark_inherited(parameters: Iterable[nn.Parameter], lr_ratio: float) -> None:
    """Let the optimizers that the adapter builds use `lr_ratio` times their rate for these.

    Raises:
        ValueError: a ratio outside [0, 1].
    """
    if not 0.0 <= lr_ratio <= 1.0:
        raise ValueError(f"inherited_lr_ratio must be in [0, 1], got {lr_ratio}")
    for parameter in parameters:
        setattr(parameter, _LR_SCALE, lr_ratio)


def lr_scale(parameter: Any) -> float:
    """The factor that `mark_inherited` left on a parameter, 1 for all others."""
    return float(getattr(parameter, _LR_SCALE, 1.0))


class Pretrained(NamedTuple):
    """A hand-over and the place of its rows in one of the host's tables.

    Attributes:
        table_name: name of the embedding table.
        handoff: item_table `[V, D]`, SEM weights, header.
        rows: `[V]` int64, the row of the host's table for each row of the item table: the raw ids
            in the header's `extra["item_ids"]`, or 0..V-1 if it has none.
    """

    table_name: str
    handoff: Handoff
    rows: Tensor

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], *, table_name: str, num_embeddings: int, width: int
    ) -> "Pretrained":
        """Read a hand-over for a table of `num_embeddings` rows of `width`.

        Raises:
            FileNotFoundError: no such file.
            HandoffError: not a hand-over, or one that does not fit into the table.
        """
        header = read_header(path)
        handoff = load_handoff(
            path,
            num_items=header["num_items"],
            embedding_dim=width,
            vocabulary_digest=header["vocabulary_digest"],
        )
        ids = header["extra"].get(_ITEM_IDS, range(header["num_items"]))
        rows = torch.tensor([int(item) for item in ids], dtype=torch.int64)
        if rows.numel() != header["num_items"]:
            raise HandoffError(
                f"{path} has {header['num_items']} items, but {rows.numel()} item_ids"
            )
        if int(rows.max()) >= num_embeddings or int(rows.min()) < 0:
            raise HandoffError(
                f"{path} holds items {int(rows.min())} to {int(rows.max())}, table {table_name!r} "
                f"has rows 0 to {num_embeddings - 1}"
            )
        return cls(table_name, handoff, rows)

    def table_by_id(self) -> Tensor:
        """The item table by host row, and one zero row more for all ids beyond."""
        table = self.handoff.item_table
        by_id = table.new_zeros(int(self.rows.max()) + 2, table.shape[1])
        by_id[self.rows] = table
        return by_id

    @torch.no_grad()
    def load_into(self, collection: Any) -> None:
        """Copy the item rows; other rows of the table stay as they are.

        Args:
            collection: torchrec's EmbeddingCollection, or what sharding made of it.

        Raises:
            RuntimeError: the table is still on `meta`.
        """
        weight = collection.state_dict()[f"embeddings.{self.table_name}.weight"]
        for shard, first_row, first_column in _local_shards(weight):
            if shard.is_meta:
                raise RuntimeError(
                    f"table {self.table_name!r} is on meta: materialise the tables first"
                )
            inside = (self.rows >= first_row) & (self.rows < first_row + shard.shape[0])
            columns = slice(first_column, first_column + shard.shape[1])
            shard[(self.rows[inside] - first_row).to(shard.device)] = self.handoff.item_table[
                inside, columns
            ].to(shard)


def _local_shards(weight: Any) -> Iterator[tuple[Tensor, int, int]]:
    """This rank's parts of a table: tensor, its first row and its first column."""
    if not hasattr(weight, "local_shards"):
        yield weight, 0, 0
        return
    for shard in weight.local_shards():
        yield shard.tensor, *shard.metadata.shard_offsets
