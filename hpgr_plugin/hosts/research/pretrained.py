"""The stage-1 hand-over in the host's item table."""

import hashlib

import torch
from torch import nn

from hpgr_plugin.components.sem import SessionEnhancementModule
from hpgr_plugin.transfer.handoff import load_handoff, load_sem_state
from hpgr_plugin.transfer.learning_rates import mark_inherited


def host_item_digest(num_items: int) -> str:
    """Digest of the host's item ids, 1..num_items in order (0 is its padding).

    The trainer tells an encoder only how many items there are, so only that can be compared; the
    host's data sets have different numbers of items.
    """
    return hashlib.sha256(f"generative_recommenders ids 1..{num_items}".encode()).hexdigest()


def load_pretrained(
    path: str,
    *,
    table: nn.Embedding,
    sem: SessionEnhancementModule | None,
    inherited_lr_ratio: float,
) -> None:
    """Load the host's table and `sem` from a hand-over, and mark them as inherited.

    Args:
        path: The file that `research_pretrain` wrote.
        table: `[num_items + 1, D]`; row 0, the padding, stays as it is.
        sem: None leaves the SEM weights of the hand-over unused.
        inherited_lr_ratio: Factor on the learning rate of what is loaded.

    Raises:
        FileNotFoundError: There is no file at `path`.
        HandoffError: It is not a hand-over for this table and SEM.
    """
    num_items, embedding_dim = table.num_embeddings - 1, table.embedding_dim
    handoff = load_handoff(
        path,
        num_items=num_items,
        embedding_dim=embedding_dim,
        vocabulary_digest=host_item_digest(num_items),
        gap_seconds=None if sem is None else sem.gap_seconds,
    )
    with torch.no_grad():
        table.weight[1:].copy_(handoff.item_table)
    mark_inherited(table.parameters(), inherited_lr_ratio)
    if sem is not None:
        load_sem_state(sem, handoff)
        mark_inherited(sem.parameters(), inherited_lr_ratio)
