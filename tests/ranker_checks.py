"""Weights with which differences show, and what holds for every ranker."""

from dataclasses import replace

import torch
from torch import nn

from hpgr_plugin.data.batch import Batch
from hpgr_plugin.hosts.embedded.model.ranker import HSTURanker


def enlarge(model: nn.Module) -> None:
    """Draw tables, gates and biases, which start small or closed, as standard normal numbers."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "table" in name or "gate" in name or "bias" in name:
                parameter.normal_()


def check_candidates_are_independent(model: HSTURanker, batch: Batch) -> None:
    """Another item as the first candidate changes no other candidate's score."""
    before = model(batch)
    items = batch.candidate_items.clone()
    items[0] = (items[0] + 1) % model.item_table.num_embeddings
    after = model(replace(batch, candidate_items=items))
    assert after[0] != before[0]
    torch.testing.assert_close(after[1:], before[1:], rtol=0, atol=1e-12)
