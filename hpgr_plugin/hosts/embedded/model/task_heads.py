"""Heads of further tasks: each predicts a label of its own from the encoded candidates."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from hpgr_plugin.hosts.slots import SlotError


def make_head(embedding_dim: int) -> nn.Sequential:
    """The MLP from an encoded candidate `[..., D]` to its logit `[..., 1]`."""
    return nn.Sequential(
        nn.LayerNorm(embedding_dim),
        nn.Linear(embedding_dim, embedding_dim),
        nn.SiLU(),
        nn.Linear(embedding_dim, 1),
    )


class TaskHead(nn.Module):
    """Logits of one further task.

    Args:
        embedding_dim: `D`.
        num_items: rows of its item bias; None for no bias.
    """

    def __init__(self, embedding_dim: int, num_items: int | None) -> None:
        super().__init__()
        self.head = make_head(embedding_dim)
        self.item_bias = None if num_items is None else nn.Embedding(num_items, 1)
        if self.item_bias is not None:
            nn.init.zeros_(self.item_bias.weight)

    def forward(self, encoded: Tensor, items: Tensor) -> Tensor:
        """Logits `[...]` of encoded candidates `[..., D]`, which are these items `[...]`."""
        logits: Tensor = self.head(encoded).squeeze(-1)
        if self.item_bias is not None:
            logits = logits + self.item_bias(items).squeeze(-1)
        return logits


class TaskHeads(nn.ModuleDict):
    """One `TaskHead` for each further task; none adds nothing to the model.

    Args:
        names: of the tasks.
        embedding_dim: `D`.
        num_items: rows of each item bias; None for no bias.
    """

    def __init__(self, names: Sequence[str], *, embedding_dim: int, num_items: int | None) -> None:
        # A module has attributes such as "type": the prefix keeps names of tasks apart from them.
        super().__init__({f"task_{name}": TaskHead(embedding_dim, num_items) for name in names})
        self.names = tuple(names)

    def logits(self, encoded: Tensor, items: Tensor) -> list[Tensor]:
        """Those of every task, in the order of `names`; see `TaskHead`."""
        return [head(encoded, items) for head in self.values()]


def chosen_tasks(binding: str, wanted: Sequence[str] | None, known: Sequence[str]) -> list[str]:
    """The tasks that a model has a head for, in the order of the data.

    Args:
        binding: names `wanted` in an error.
        wanted: None for all of them.
        known: further tasks of the data.

    Raises:
        SlotError: a task that the data does not have.
    """
    for name in wanted or ():
        if name not in known:
            raise SlotError(
                f"{binding} takes tasks of hpgr.prepare_data.tasks, which are {list(known)}, "
                f"got {name!r}"
            )
    return [name for name in known if wanted is None or name in wanted]
