"""Small catalogues, users, and decoders of each kind over them."""

import torch

from hpgr_plugin.components.slates.blocks import Context
from hpgr_plugin.components.slates.decoder import (
    DecoderSizes,
    FlatItemDecoder,
    FlatSlateDecoder,
    HierarchicalDecoder,
    SlateDecoder,
)
from hpgr_plugin.components.slates.semantic_ids import SemanticIds

WIDTH = 16
MOST_ITEMS = 200
KINDS = {
    "hierarchical": (HierarchicalDecoder, {"planner_layers": 2}),
    "no-planner": (HierarchicalDecoder, {"planner_layers": 0}),
    "no-context": (HierarchicalDecoder, {"planner_layers": 1, "generator_context": False}),
    "items": (HierarchicalDecoder, {"planner_layers": 2, "item_scores": True}),
    "flat-item": (FlatItemDecoder, {"num_layers": 2}),
    "flat-slate": (FlatSlateDecoder, {"num_layers": 2}),
}


def catalogue(items: int = 50, *, codebook_size: int = 4, levels: int = 3, seed: int = 0):
    """Random digits from few codewords, so that items collide."""
    rng = torch.Generator().manual_seed(seed)
    digits = torch.randint(0, codebook_size, (items, levels), generator=rng)
    return SemanticIds(digits, codebook_size=codebook_size)


def decoder_of(kind: str, ids: SemanticIds, slate_size: int = 4) -> SlateDecoder:
    """In evaluation mode, with weights whose output is far from uniform."""
    torch.manual_seed(1)
    cls, arguments = KINDS[kind]
    sizes = DecoderSizes(embedding_dim=WIDTH, num_heads=2, dropout=0.0, slate_size=slate_size)
    model = cls(ids=ids, sizes=sizes, **arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def users(seed: int = 2) -> Context:
    """Three users; the last has a single token."""
    rng = torch.Generator().manual_seed(seed)
    real = torch.tensor([[True] * 5, [True] * 3 + [False] * 2, [True] + [False] * 4])
    tokens, items = (torch.randn(*n, WIDTH, generator=rng) for n in ((3, 5), (MOST_ITEMS,)))
    return Context(tokens, real, 0.2 * items)


def user(context: Context, number: int) -> Context:
    """One of them, without padding."""
    length = int(context.real[number].sum())
    tokens, real = (x[number : number + 1, :length] for x in context[:2])
    return Context(tokens, real, context.items)
