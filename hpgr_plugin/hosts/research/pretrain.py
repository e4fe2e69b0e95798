"""Stage 1 over the data sets of the host's retrieval trainer."""

import logging
from typing import NamedTuple

import torch
from generative_recommenders.research.data.reco_dataset import get_reco_dataset
from torch import Tensor
from torch.utils.data import DataLoader

from hpgr_plugin.config.registry import build
from hpgr_plugin.hosts.research.modules import WHY_CAUSAL
from hpgr_plugin.hosts.research.pretrained import host_item_digest
from hpgr_plugin.ops.jagged import complete_cumsum
from hpgr_plugin.transfer.handoff import save_handoff

logger = logging.getLogger(__name__)


class Histories(NamedTuple):
    """Users' items in order of time, as masked item modelling takes them.

    Attributes:
        items: `[T]` int64 in 0..V-1: the host's ids minus 1, as 0 is its padding.
        offsets: `[B + 1]` int64.
        timestamps: `[T]` int64 seconds.
    """

    items: Tensor
    offsets: Tensor
    timestamps: Tensor


def histories_of_rows(rows: dict[str, Tensor]) -> Histories:
    """A batch of the host's rows, with the target appended to the history.

    Args:
        rows: "historical_ids" and "historical_timestamps" `[B, N]`, "history_lengths" `[B]`,
            "target_ids" and "target_timestamps" `[B]`.
    """
    lengths = rows["history_lengths"]
    width = rows["historical_ids"].shape[1]
    inside = torch.arange(width + 1) <= lengths.unsqueeze(1)

    def with_target(past: str, target: str) -> Tensor:
        padded = torch.nn.functional.pad(rows[past], (0, 1))
        padded = padded.scatter(1, lengths.unsqueeze(1), rows[target].unsqueeze(1))
        return padded[inside]

    return Histories(
        items=with_target("historical_ids", "target_ids") - 1,
        offsets=complete_cumsum(lengths + 1),
        timestamps=with_target("historical_timestamps", "target_timestamps"),
    )


def research_pretrain(
    *,
    output: str,
    dataset_name: str,
    max_sequence_length: int,
    item_embedding_dim: int,
    num_epochs: int = 10,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.0,
    seed: int = 0,
    device: str | None = None,
) -> None:
    """Masked item modelling (Eq. 3) on the host's training rows; writes a hand-over.

    The model is gin's `hpgr.MaskedItemModel`. Its `sem` must have the settings of the one in
    `hpgr.SequentialEncoder`. The rows are those of the host's training set, which ends one item
    before the item that its evaluation predicts.

    Args:
        output: Path of the hand-over.
        dataset_name: As in the host's `train_fn`.
        max_sequence_length: As in the host's `train_fn`.
        item_embedding_dim: As in the host's `train_fn`.
        num_epochs: Passes over the rows.
        batch_size: Users per step.
        learning_rate: That of AdamW.
        weight_decay: That of AdamW.
        seed: That of the weights, the order of the rows and the masks.
        device: None takes a GPU if there is one.
    """
    torch.manual_seed(seed)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dataset = get_reco_dataset(
        dataset_name=dataset_name, max_sequence_length=max_sequence_length, chronological=True
    )
    model = build(
        "MaskedItemModel",
        num_items=dataset.max_item_id,
        embedding_dim=item_embedding_dim,
        max_sequence_length=max_sequence_length + 1,
    ).to(place)
    if model.sem is not None:
        model.sem.decide_causal(True, WHY_CAUSAL)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay)
    generator = torch.Generator().manual_seed(seed)
    loader = DataLoader(
        dataset.train_dataset, batch_size=batch_size, shuffle=True, generator=generator
    )
    model.train()
    for epoch in range(num_epochs):
        total, count = 0.0, 0
        for rows in loader:
            batch = Histories(*(tensor.to(place) for tensor in histories_of_rows(rows)))
            output_of_batch = model(*batch, generator=generator)
            optimizer.zero_grad()
            output_of_batch.loss.backward()
            optimizer.step()
            total += output_of_batch.loss.item() * output_of_batch.num_masked
            count += output_of_batch.num_masked
        logger.info(
            "pretrain epoch %d: loss %.4f over %d items", epoch, total / max(1, count), count
        )
    save_handoff(
        output,
        item_table=model.item_table.weight,
        sem=model.sem,
        vocabulary_digest=host_item_digest(dataset.max_item_id),
        gap_seconds=model.gap_seconds,
        extra={"item_ids": list(range(1, dataset.max_item_id + 1)), "dataset": dataset_name},
    )
    logger.info("pretrain: wrote %s", output)
