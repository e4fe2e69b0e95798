"""A small slate model with random weights."""

import torch

from hpgr_plugin.components.slates.decoder import HierarchicalDecoder
from hpgr_plugin.components.slates.semantic_ids import SemanticIds
from hpgr_plugin.hosts.embedded.slates.model import SlateModel


def small_slate_model(num_items: int, num_actions: int, vocabulary_digest: str = "") -> SlateModel:
    """Items of two random digits, one planner layer, and weights far enough from their start."""
    torch.manual_seed(0)
    model = SlateModel(
        num_items=num_items,
        num_actions=num_actions,
        vocabulary_digest=vocabulary_digest,
        ids=SemanticIds(torch.randint(0, 8, (num_items, 2)), codebook_size=8),
        decoder=HierarchicalDecoder,
        decoder_arguments={"planner_layers": 1},
        embedding_dim=16,
        max_history=60,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model
