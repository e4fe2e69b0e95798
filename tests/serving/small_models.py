"""Small rankers with random weights, and requests for them."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import nn

from hpgr_plugin.components.attention_hooks import (
    AttentionHook,
    PreferenceGuidedSparseAttention,
    StochasticLength,
)
from hpgr_plugin.components.positions import TimeAwarePositionalEncoder
from hpgr_plugin.components.sem import SessionEnhancementModule
from hpgr_plugin.data.batch import Batch
from hpgr_plugin.hosts.embedded.model.hstu import HSTULayer, SequenceLayer
from hpgr_plugin.hosts.embedded.model.ranker import HSTURanker
from hpgr_plugin.serving import chunks

DIM, ITEMS, YEAR = 16, 50, 10**6


def pgsa(**settings: object) -> PreferenceGuidedSparseAttention:
    return PreferenceGuidedSparseAttention(**{"layout": "shared_history", **settings})  # type: ignore[arg-type]


HOOKS: dict[str, Callable[[], AttentionHook | None]] = {
    "dense": lambda: None,
    "recent": lambda: pgsa(top_k=3, sigma=1.0, recent=4),
    "paper": lambda: pgsa(top_k=50, sigma=2.0),
    "anchors only, before the gate": lambda: pgsa(top_k=3, mask_position="pre"),
    "no anchors": lambda: pgsa(top_k=0, recent=5),
    "frozen": lambda: pgsa(top_k=4, table="frozen"),
    "cosine": lambda: pgsa(top_k=4, score="cosine"),
    "stochastic length": lambda: StochasticLength(alpha=1.5),
}


def ranker(
    layer: type[SequenceLayer] = HSTULayer,
    hook: AttentionHook | None = None,
    *,
    sem: bool = False,
    relative_bias: bool = True,
    **settings: object,
) -> HSTURanker:
    fields: dict = {
        "num_items": ITEMS,
        "num_actions": 3,
        "vocabulary_digest": "",
        "user_feature_sizes": {"age": 4},
        "item_feature_codes": {"genre": torch.randint(0, 5, (ITEMS,))},
        "embedding_dim": DIM,
        "num_layers": 3,
        "layer": layer,
        "max_history": 100,
        "relative_bias": relative_bias,
        "positional_encoder": TimeAwarePositionalEncoder(embedding_dim=DIM, max_positions=101),
        "sem": None,
        "attention_hook": hook,
    }
    if sem:
        fields["sem"] = SessionEnhancementModule(embedding_dim=DIM, causal=True, gap_seconds=9000)
    model = HSTURanker(**{**fields, **settings}).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def compute_in_chunks(monkeypatch: pytest.MonkeyPatch, elements: int) -> None:
    """From now on, so many numbers are computed at once."""
    monkeypatch.setattr(chunks, "ON_CPU", dict.fromkeys(chunks.ON_CPU, elements))
    monkeypatch.setattr(chunks, "ON_GPU", elements)


def offsets(lengths: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def requests(
    lengths: Sequence[int] = (40, 0, 7, 100),
    counts: Sequence[int] = (5, 3, 1, 20),
    *,
    one_time: bool = True,
) -> Batch:
    items, candidates = sum(lengths), sum(counts)

    def times(sizes: Sequence[int]) -> torch.Tensor:
        return torch.cat([torch.randint(0, YEAR, (n,)).sort().values for n in sizes])

    return Batch(
        history_items=torch.randint(0, ITEMS, (items,)),
        history_timestamps=times(lengths),
        history_actions=torch.randint(0, 3, (items,)),
        history_offsets=offsets(lengths),
        candidate_items=torch.randint(0, ITEMS, (candidates,)),
        candidate_timestamps=torch.full((candidates,), 2 * YEAR) if one_time else times(counts),
        candidate_labels=torch.zeros(candidates),
        candidate_offsets=offsets(counts),
        users=torch.arange(len(lengths)),
        user_features={"age": torch.randint(0, 4, (len(lengths),))},
    )
