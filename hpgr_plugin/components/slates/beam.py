"""Beam search in the trie of semantic ids: only SIDs that exist, only items that are allowed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hpgr_plugin.components.slates.semantic_ids import Children, SemanticIds


class Beams(NamedTuple):
    """W partial SIDs of each of B users, best first.

    Attributes:
        nodes: int64 `[B, W]`, nodes of one level of the trie.
        scores: `[B, W]`, log-probabilities; -inf where there are fewer than W.
        origin: int64 `[B, W]`, the beam of the level before that each continues.
        digits: int64 `[B, W]`, the last digit.
    """

    nodes: Tensor
    scores: Tensor
    origin: Tensor
    digits: Tensor


class Allowed(NamedTuple):
    """Which items may be in a slate.

    Attributes:
        ids: the semantic ids.
        free: allowed items below every node by level, see `SemanticIds.free_items`; `[1, nodes]`
            where all users may have everything.
    """

    ids: SemanticIds
    free: list[Tensor]

    @staticmethod
    def all_but(ids: SemanticIds, excluded: Tensor | None, *, least: int) -> Allowed:
        """Every item but the excluded ones.

        Args:
            ids: the semantic ids.
            excluded: bool `[B, V]`, or None for none.
            least: a user with fewer items left than this may have all of them.
        """
        if excluded is None:
            excluded = torch.zeros(1, ids.num_items, dtype=torch.bool, device=ids.codes.device)
        enough = (~excluded).sum(1, keepdim=True) >= least
        return Allowed(ids, ids.free_items(excluded & enough))

    def left(self, level: int, nodes: Tensor, chosen: Tensor) -> Tensor:
        """How many items below nodes of `level` are allowed and not chosen yet.

        Args:
            level: of the nodes, 1 to L.
            nodes: int64 `[B, W, m]`.
            chosen: int64 `[B, W, S]`, items already in the slate.
        """
        free = self.free[level - 1]
        if len(free) == 1:
            count = free[0][nodes]
        else:
            count = free.gather(1, nodes.flatten(1)).view(nodes.shape)
        for item in chosen.unbind(2):
            count = count - (self.ids.item_nodes[item, level].unsqueeze(2) == nodes).long()
        return count


def start_beams(batch_size: int, device: torch.device) -> Beams:
    """One beam per user at the root."""
    root = torch.zeros(batch_size, 1, dtype=torch.long, device=device)
    return Beams(root, torch.zeros(batch_size, 1, device=device), root, root)


def child_log_probs(logits: Tensor, children: Children) -> Tensor:
    """Log-softmax over the digits that exist below a node.

    So the probabilities of all items sum to one, and a digit without a choice has probability one.

    Args:
        logits: `[..., K]` of a level.
        children: `[..., m]` of the nodes.

    Returns:
        `[..., m]`, -inf at invalid places.
    """
    chosen = logits.float().gather(-1, children.digits)
    return chosen.masked_fill(~children.valid, -torch.inf).log_softmax(-1)


def expand(
    beams: Beams, logits: Tensor, allowed: Allowed, *, level: int, chosen: Tensor, width: int
) -> Beams:
    """Continue beams by one digit and keep the best.

    Args:
        beams: at nodes of `level`.
        logits: `[B, W, K]` of the next digit.
        allowed: which items may be chosen.
        level: 0 to L - 1.
        chosen: int64 `[B, W, S]`, items already in the slate of each beam.
        width: most beams to keep.
    """
    children = allowed.ids.below(level, beams.nodes)
    scores = beams.scores.unsqueeze(2) + child_log_probs(logits, children)
    scores = scores.masked_fill(allowed.left(level + 1, children.nodes, chosen) < 1, -torch.inf)
    most = scores.shape[2]
    best, place = scores.flatten(1).topk(min(width, scores[0].numel()), dim=1)
    nodes, digits = (x.flatten(1).gather(1, place) for x in (children.nodes, children.digits))
    return Beams(nodes, best, place // most, digits)
