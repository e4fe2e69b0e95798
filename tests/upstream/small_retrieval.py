"""A small encoder of the host's retrieval trainer and batches for it."""

from typing import Any

import torch
from generative_recommenders.research.modeling.sequential.embedding_modules import (
    LocalEmbeddingModule,
)
from generative_recommenders.research.modeling.sequential.input_features_preprocessors import (
    LearnablePositionalEmbeddingInputFeaturesPreprocessor,
)
from generative_recommenders.research.modeling.sequential.output_postprocessors import (
    L2NormEmbeddingPostprocessor,
)
from generative_recommenders.research.rails.similarities.dot_product_similarity_fn import (
    DotProductSimilarity,
)
from generative_recommenders.research.trainer import train as host_train
from torch import Tensor

NUM_ITEMS = 60
DIM = 16
MAX_LENGTH = 12
OUTPUT_LENGTH = 3
WIDTH = MAX_LENGTH + OUTPUT_LENGTH
START = 1_700_000_000


def build(module_type: str = "HSTU", *, seed: int = 0, preprocessor: Any = None) -> Any:
    """What train_fn builds, through the name that train_fn looks up."""
    torch.manual_seed(seed)
    if preprocessor is None:
        preprocessor = LearnablePositionalEmbeddingInputFeaturesPreprocessor(
            max_sequence_len=WIDTH, embedding_dim=DIM, dropout_rate=0.0
        )
    return host_train.get_sequential_encoder(
        module_type=module_type,
        max_sequence_length=MAX_LENGTH,
        max_output_length=OUTPUT_LENGTH,
        embedding_module=LocalEmbeddingModule(num_items=NUM_ITEMS, item_embedding_dim=DIM),
        interaction_module=DotProductSimilarity(),
        input_preproc_module=preprocessor,
        output_postproc_module=L2NormEmbeddingPostprocessor(embedding_dim=DIM, eps=1e-6),
        verbose=False,
    )


def batch(lengths: list[int], *, seed: int = 0, pauses: bool = True) -> dict[str, Tensor]:
    """Keyword arguments of the encoder but for the embeddings: ids, lengths and timestamps.

    As in the host's training step, the target stands behind the history, which the lengths leave
    out. Gaps between items are seconds, or with `pauses` now and then a day.
    """
    generator = torch.Generator().manual_seed(seed)
    size = (len(lengths), WIDTH)
    gaps = torch.randint(0, 60, size, generator=generator)
    if pauses:
        gaps += 86_400 * (torch.rand(size, generator=generator) < 0.3)
    column = torch.arange(WIDTH)
    end = torch.tensor(lengths).unsqueeze(1)
    ids = torch.randint(1, NUM_ITEMS + 1, size, generator=generator)
    times = START + gaps.cumsum(1)
    return {
        "past_lengths": torch.tensor(lengths),
        "past_ids": torch.where(column <= end, ids, 0),
        "timestamps": torch.where(column <= end, times, 0),
    }


def run(encoder: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Encoded sequences `[B, N, D]`."""
    encoded: Tensor = encoder(
        past_lengths=inputs["past_lengths"],
        past_ids=inputs["past_ids"],
        past_embeddings=encoder.get_item_embeddings(inputs["past_ids"]),
        past_payloads={
            "timestamps": inputs["timestamps"],
            "ratings": torch.zeros_like(inputs["past_ids"]),
        },
    )
    return encoded
