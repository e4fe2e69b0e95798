"""The stage `tokenize`: item vectors of stage 1, or of a file, to semantic ids."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from hpgr_plugin.components.slates.quality import (
    COLLAPSED,
    codebook_use,
    collision_rate,
    tokenizer_quality,
)
from hpgr_plugin.components.slates.semantic_ids import SemanticIds
from hpgr_plugin.components.slates.tokenizer import RQVAE, ItemTokenizer
from hpgr_plugin.data import PreparedData
from hpgr_plugin.data.events import require_fields
from hpgr_plugin.errors import HpgrError
from hpgr_plugin.hosts.embedded.slates.artefact import Tokens, save_tokens
from hpgr_plugin.hosts.embedded.slates.items import ItemLoader, draw_positives, positive_items
from hpgr_plugin.hosts.embedded.train.distributed import barrier, seed_everything
from hpgr_plugin.hosts.embedded.train.trainer import Trainer, TrainingRun, TrainSettings
from hpgr_plugin.transfer.handoff import load_handoff, read_header

LOG = logging.getLogger(__name__)
TOKENS = "tokens.safetensors"


@dataclass(frozen=True)
class TokenizeSettings(TrainSettings):
    """`TrainSettings` of the tokenizer, and what it reads.

    Attributes:
        embeddings: a stage-1 hand-over, or a .npy file [V, E] with a row for every item of the
            log, in the order of its codes.
        tokenizer: the class `CRQVAE`, `RQVAE` or `ResidualKMeans`.
        index_size: most items that may share their digits.
        passes: times that every item comes in an epoch.
        autoencoder_passes: passes over the items before the codebooks are fitted.
        batch_items: items of a batch.
        window: events inside which two items of a user go together (positives of L_cont).
        positives: so many of these for each item, and so many neighbours.
        least_cosine: of a neighbour that is a positive.
    """

    passes: int = 10
    autoencoder_passes: int = 50
    embeddings: str | None = None
    tokenizer: type[ItemTokenizer] | None = None
    index_size: int = 32
    batch_items: int = 512
    window: int = 3
    positives: int = 5
    least_cosine: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        require_fields(self, 0, "autoencoder_passes")
        require_fields(self, 1, "index_size", "passes", "batch_items", "window", "positives")


@dataclass(frozen=True)
class Tokenized:
    """A finished tokenizer.

    Attributes:
        tokens: the file that slate models start from.
        metrics: quality, cost and warnings.
    """

    tokens: Path
    metrics: dict[str, Any]


def tokenize(data: PreparedData, settings: TokenizeSettings, run: TrainingRun) -> Tokenized:
    """Train a tokenizer and write the semantic ids of all items.

    Args:
        data: whose items they are, and what goes together.
        settings: how it is trained.
        run: seed, folder and process.

    Raises:
        HpgrError: no embeddings, or they are of other items.
    """
    seed_everything(run.seed)
    if settings.embeddings is None:
        raise HpgrError("hpgr.TokenizeSettings.embeddings takes a hand-over or a .npy file")
    vectors = read_vectors(Path(settings.embeddings), data).to(run.process.device)
    if settings.tokenizer is None:
        raise HpgrError("hpgr.TokenizeSettings.tokenizer takes @hpgr.CRQVAE, without brackets")
    tokenizer = settings.tokenizer(input_dim=vectors.shape[1]).to(run.process.device)
    if isinstance(tokenizer, RQVAE):
        _train_autoencoder(tokenizer, vectors, settings, run.seed)
    tokenizer.fit_codebooks(vectors, torch.Generator().manual_seed(run.seed))
    cost: dict[str, Any] = {}
    if isinstance(tokenizer, RQVAE):
        cost = _train(tokenizer, vectors, data, settings, run)
    tokenizer.eval()
    digits = tokenizer.digits(vectors)
    size = tokenizer.codebook_size
    quality: dict[str, Any] = tokenizer_quality(vectors, digits, size)
    ids = SemanticIds(digits, codebook_size=size, index_size=settings.index_size)
    warnings = [
        f"the codebook of level {level + 1} has collapsed: it uses {use:.2f} of its entropy"
        for level, use in enumerate(codebook_use(digits, size))
        if use < COLLAPSED
    ]
    for sentence in warnings:
        LOG.warning("%s: %s", run.title, sentence)
    path = run.output_dir / TOKENS
    if run.process.is_main:
        tokens = Tokens(ids, vectors, tokenizer)
        save_tokens(path, tokens, vocabulary_digest=data.log.item_vocabulary_digest)
    barrier()
    return Tokenized(path, quality | cost | {"warnings": warnings})


def read_vectors(path: Path, data: PreparedData) -> Tensor:
    """The item vectors `[V, E]` of a hand-over or a .npy file.

    Raises:
        FileNotFoundError: no such file.
        HpgrError: it is damaged, or not of these items.
    """
    if path.suffix != ".npy":
        header = read_header(path)
        return load_handoff(
            path,
            num_items=data.log.num_items,
            embedding_dim=header["embedding_dim"],
            vocabulary_digest=data.log.item_vocabulary_digest,
        ).item_table.float()
    try:
        values = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, EOFError) as error:
        raise HpgrError(f"{path} is damaged or no .npy file: {error}") from error
    fits = values.ndim == 2 and len(values) == data.log.num_items and values.dtype.kind == "f"
    if not fits or not np.isfinite(values).all():
        raise HpgrError(
            f"{path} takes finite floats [{data.log.num_items}, E], one row for every item of the "
            f"data, got {values.dtype} {list(values.shape)}"
        )
    return torch.from_numpy(values.astype(np.float32))


def _train_autoencoder(
    tokenizer: RQVAE, vectors: Tensor, settings: TokenizeSettings, seed: int
) -> None:
    """Train encoder and decoder only: short, and the same in every run, so nothing is saved."""
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=settings.learning_rate)
    loader = ItemLoader(len(vectors), passes=1, batch_items=settings.batch_items, seed=seed)
    for number in range(settings.autoencoder_passes):
        for items in loader.batches(number):
            optimizer.zero_grad()
            tokenizer.autoencoding_loss(vectors[items.to(vectors.device)]).backward()
            optimizer.step()


def _train(
    tokenizer: RQVAE,
    vectors: Tensor,
    data: PreparedData,
    settings: TokenizeSettings,
    run: TrainingRun,
) -> dict[str, Any]:
    positives = positive_items(
        data,
        vectors,
        window=settings.window,
        most=settings.positives,
        least_cosine=settings.least_cosine,
    ).to(vectors.device)

    def loss(forward: nn.Module, items: Tensor, step: int) -> tuple[Tensor, int]:
        drawn, has_one = draw_positives(positives, items)
        others = torch.where(has_one.unsqueeze(1), vectors[drawn], torch.nan)
        return cast(Tensor, forward(vectors[items], others)) * len(items), len(items)

    def validate() -> dict[str, float]:
        digits = tokenizer.digits(vectors)
        return {
            "reconstruction": float(tokenizer.reconstruction_error(vectors)),
            "collision_rate": collision_rate(digits),
            "codebook_use": min(codebook_use(digits, tokenizer.codebook_size)),
        }

    trainer = Trainer(
        model=tokenizer,
        groups=[{"params": list(tokenizer.parameters()), "lr": settings.learning_rate}],
        loader=ItemLoader(
            len(vectors),
            passes=settings.passes,
            batch_items=settings.batch_items,
            seed=run.seed,
        ),
        loss=loss,
        validate=validate,
        monitor=("reconstruction", False),
        settings=replace(settings, autocast=False),
        run=replace(run, stage="tokenize"),
    )
    cost = trainer.fit()
    return cost | {"reconstruction": trainer.best["reconstruction"]}
