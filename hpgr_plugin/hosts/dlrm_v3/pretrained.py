"""The stage-1 hand-over in the host's embedding collection, whole or sharded."""

import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hpgr_plugin.transfer.handoff import Handoff, HandoffError, load_handoff, read_header

_ITEM_IDS = "item_ids"


class Pretrained(NamedTuple):
    """A hand-over, and where its rows belong in one of the host's tables.

    Attributes:
        table_name: Name of the embedding table.
        handoff: Item table `[V, D]`, SEM weights and header.
        rows: The row of the host's table for each row of the item table, `[V]` int64: the raw ids
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
            FileNotFoundError: There is no such file.
            HandoffError: It is not a hand-over, or does not fit into the table.
        """
        header = read_header(path)
        handoff = load_handoff(
            path,
            num_items=header["num_items"],
            embedding_dim=width,
            vocabulary_digest=header["vocabulary_digest"],
        )
        ids = handoff.header["extra"].get(_ITEM_IDS, range(header["num_items"]))
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
        """The item table by row of the host's table, with one zero row for all larger ids."""
        table = self.handoff.item_table
        by_id = table.new_zeros(int(self.rows.max()) + 2, table.shape[1])
        by_id[self.rows] = table
        return by_id

    @torch.no_grad()
    def load_into(self, collection: Any) -> None:
        """Copy the item rows into the table; its other rows stay as they are.

        Args:
            collection: torchrec's EmbeddingCollection, sharded or not.

        Raises:
            RuntimeError: The table is still on the `meta` device.
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
