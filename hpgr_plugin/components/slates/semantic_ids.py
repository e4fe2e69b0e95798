"""Semantic ids (SIDs): the digits of every item, and the trie of the SIDs that exist.

An item has the digits s^1 .. s^D of its tokenizer and one more, an index among the items that
share them, so that SID and item are one to one. Where no items collide the index is always 0.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hpgr_plugin.components.checks import check_at_least
from hpgr_plugin.errors import HpgrError


class Children(NamedTuple):
    """The children of some trie nodes, m at most.

    Attributes:
        nodes: int64 `[..., m]`, nodes one level deeper; those of invalid places mean nothing.
        digits: int64 `[..., m]`, the digit that leads to each.
        valid: bool `[..., m]`.
    """

    nodes: Tensor
    digits: Tensor
    valid: Tensor


class SemanticIds(nn.Module):
    """The SID of every item and their trie, L = D + 1 digits; on the device of its model.

    Nodes are numbered by level, in the order of their SIDs, so that the children of a node are
    neighbours. Level 0 is the root only, the nodes of level L are the items.

    Args:
        digits: int64 `[V, D]`, from a tokenizer.
        codebook_size: K, digits are 0..K-1.
        index_size: size of the last level, at least the most items that share D digits.

    Raises:
        HpgrError: more items share their digits than `index_size`, or a digit out of its range.
    """

    codes: Tensor  # [V, L]
    item_nodes: Tensor  # [V, L + 1]
    leaf_items: Tensor  # [V], the item of every node of level L

    def __init__(self, digits: Tensor, *, codebook_size: int, index_size: int = 32) -> None:
        super().__init__()
        check_at_least(1, codebook_size=codebook_size, index_size=index_size)
        if digits.dim() != 2 or not len(digits):
            raise HpgrError(f"digits must be [V, D] with V above 0, got {list(digits.shape)}")
        if int(digits.min()) < 0 or int(digits.max()) >= codebook_size:
            raise HpgrError(
                f"digits must be 0 to {codebook_size - 1}, "
                f"got {int(digits.min())} to {int(digits.max())}"
            )
        index = _index_among_equal(digits)
        if int(index.max()) >= index_size:
            raise HpgrError(
                f"{int(index.max()) + 1} items share one semantic id, index_size is {index_size}: "
                "the codebooks have collapsed, or hpgr.TokenizeSettings.index_size is too small"
            )
        self.codebook_size, self.index_size = codebook_size, index_size
        codes = torch.cat([digits.long(), index.unsqueeze(1)], dim=1)
        order = _lexicographic(codes)
        nodes, starts, edges, most = _trie(codes[order])
        item_nodes = torch.empty_like(nodes)
        item_nodes[order] = nodes
        for name, value in (("codes", codes), ("item_nodes", item_nodes), ("leaf_items", order)):
            self.register_buffer(name, value, persistent=False)
        for level, (start, edge) in enumerate(zip(starts, edges, strict=True)):
            self.register_buffer(f"start_{level}", start, persistent=False)
            self.register_buffer(f"edge_{level}", edge, persistent=False)
        self.most_children = most

    @property
    def num_items(self) -> int:
        """V."""
        return self.codes.shape[0]

    @property
    def num_levels(self) -> int:
        """L."""
        return self.codes.shape[1]

    @property
    def level_sizes(self) -> list[int]:
        """How many digits each level has."""
        return [self.codebook_size] * (self.num_levels - 1) + [self.index_size]

    @property
    def num_decoded(self) -> int:
        """Levels that leave a choice anywhere: without collisions the index never does."""
        return self.num_levels - (self.most_children[-1] == 1)

    def below(self, level: int, nodes: Tensor) -> Children:
        """The children of nodes `[...]` of this level."""
        start, edge = getattr(self, f"start_{level}"), getattr(self, f"edge_{level}")
        place = torch.arange(self.most_children[level], device=nodes.device)
        child = start[nodes].unsqueeze(-1) + place
        valid = child < start[nodes + 1].unsqueeze(-1)
        child = torch.where(valid, child, 0)
        return Children(child, edge[child], valid)

    def items_of(self, nodes: Tensor, level: int) -> Tensor:
        """The first item below each node of a level; of level L its item, and of the level before
        where `num_decoded` says that it has only one."""
        for deeper in range(level, self.num_levels):
            nodes = getattr(self, f"start_{deeper}")[nodes]
        return self.leaf_items[nodes]

    def is_choice(self, items: Tensor) -> Tensor:
        """Whether each digit was chosen among several, bool `[..., L]` for items `[...]`."""
        counts = []
        for level in range(self.num_levels):
            node = self.item_nodes[items, level]
            start = getattr(self, f"start_{level}")
            counts.append(start[node + 1] - start[node] > 1)
        return torch.stack(counts, dim=-1)

    def free_items(self, excluded: Tensor) -> list[Tensor]:
        """How many items below each node are not excluded: int64 `[B, nodes]` for levels 1 to L.

        Args:
            excluded: bool `[B, V]`.
        """
        counted = (~excluded).long()
        return [
            counted.new_zeros(len(excluded), len(getattr(self, f"edge_{level}"))).index_add_(
                1, self.item_nodes[:, level + 1], counted
            )
            for level in range(self.num_levels)
        ]

    def with_items(self, digits: Tensor) -> SemanticIds:
        """The SIDs with new items behind the old ones, whose SIDs do not change.

        Args:
            digits: int64 `[V', D]` of the new items, from the same tokenizer.
        """
        every = torch.cat([self.codes[:, :-1], digits.to(self.codes)])
        return SemanticIds(every, codebook_size=self.codebook_size, index_size=self.index_size)


def _index_among_equal(digits: Tensor) -> Tensor:
    """The number of earlier rows that are equal to each row, int64 `[V]`."""
    _, group = digits.unique(dim=0, return_inverse=True)
    order = group.argsort(stable=True)
    counts = group.bincount()
    starts = counts.cumsum(0) - counts
    index = torch.empty_like(group)
    index[order] = torch.arange(len(group), device=group.device) - starts[group[order]]
    return index


def _lexicographic(codes: Tensor) -> Tensor:
    """The order that sorts rows `[V, L]` by their first digit, then the next: int64 `[V]`."""
    order = torch.arange(len(codes), device=codes.device)
    for column in reversed(codes.unbind(1)):
        order = order[column[order].argsort(stable=True)]
    return order


def _trie(codes: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor], list[int]]:
    """Nodes of sorted SIDs `[V, L + 1]`; first child of every node, digit to every node, and most
    children, by level."""
    changed = torch.zeros(len(codes), dtype=torch.bool, device=codes.device)
    levels = [changed.long()]
    for column in codes.unbind(1):
        changed = changed.clone()
        changed[1:] |= column[1:] != column[:-1]
        levels.append(changed.long().cumsum(0))
    starts, edges, most = [], [], []
    for column, (parent, child) in zip(codes.unbind(1), itertools.pairwise(levels), strict=True):
        first = torch.ones_like(changed)
        first[1:] = child[1:] != child[:-1]
        counts = parent[first].bincount()
        starts.append(torch.cat([counts.new_zeros(1), counts.cumsum(0)]))
        edges.append(column[first])
        most.append(int(counts.max()))
    return torch.stack(levels, dim=1), starts, edges, most
