"""The input preprocessor that holds the slots, around the host's own."""

import math
from typing import Any

import torch
from generative_recommenders.research.modeling.sequential import input_features_preprocessors
from torch import Tensor, nn

from hpgr_plugin.components.positions import TimeAwarePositionalEncoder
from hpgr_plugin.components.sem import SessionEnhancementModule
from hpgr_plugin.hosts.slots import SlotError
from hpgr_plugin.ops.jagged import complete_cumsum, dense_to_jagged, jagged_to_padded_dense

_TIMESTAMPS = "timestamps"
WHY_CAUSAL = "the retrieval trainer predicts every next item of a history"


class HierarchicalInputPreprocessor(nn.Module):
    """SEM and time-aware positions in front of the host's own preprocessor.

    SEM works on the raw rows of the item table, where stage 1 trained it. The host then scales by
    sqrt(D), applies dropout and masks. With a positional encoder the host's positions are zero, and
    the encoder's are added on the same scale: `sqrt(D) e + position`.

    The trainer has no candidate, so the encoder numbers only the history, 1..N (Eq. 4). Rows past
    `past_lengths` (padding, and in training the target) stay unchanged: the host's encoders do not
    read them for any supervised row.

    Args:
        host_preprocessor: The host's, already built.
        sem: None, or a SEM, which takes the causal form.
        positional_encoder: None keeps the host's positions.

    Raises:
        HpgrError: A SEM with `causal=False`.
        SlotError: A host preprocessor that has not one position per item.
    """

    def __init__(
        self,
        host_preprocessor: Any,
        *,
        sem: SessionEnhancementModule | None,
        positional_encoder: TimeAwarePositionalEncoder | None,
    ) -> None:
        super().__init__()
        if sem is not None:
            sem.refuse_tokens("hpgr.SequentialEncoder")
            sem.decide_causal(True, WHY_CAUSAL)
        self.host_preprocessor: Any = host_preprocessor
        self.sem = sem
        self.positional_encoder = positional_encoder
        if positional_encoder is not None:
            self.position_scale = _take_positions_out(host_preprocessor)

    def debug_str(self) -> str:
        """The host's name for its folders and logs, with what was added."""
        parts = [self.host_preprocessor.debug_str()]
        parts += ["sem"] if self.sem is not None else []
        parts += ["tape"] if self.positional_encoder is not None else []
        return "-".join(parts)

    def forward(
        self,
        past_lengths: Tensor,
        past_ids: Tensor,
        past_embeddings: Tensor,
        past_payloads: dict[str, Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Enrich the histories, then preprocess them as the host does.

        Args:
            past_lengths: `[B]`.
            past_ids: `[B, N]`, 0 is padding.
            past_embeddings: `[B, N, D]`.
            past_payloads: "timestamps" `[B, N]` in seconds, and the host's others.

        Raises:
            ValueError: There are no timestamps, or a history is out of order.
        """
        if _TIMESTAMPS not in past_payloads:
            raise ValueError(
                f'past_payloads must hold "{_TIMESTAMPS}", got {sorted(past_payloads)}'
            )
        enriched = self._enrich(past_lengths, past_embeddings, past_payloads[_TIMESTAMPS])
        lengths, embeddings, mask = self.host_preprocessor(
            past_lengths=past_lengths,
            past_ids=past_ids,
            past_embeddings=enriched,
            past_payloads=past_payloads,
        )
        return lengths, embeddings, mask

    def _enrich(self, lengths: Tensor, embeddings: Tensor, timestamps: Tensor) -> Tensor:
        """`[B, N, D]` with the first `lengths[b]` rows of each user enriched."""
        offsets = complete_cumsum(lengths.long())
        total = int(offsets[-1].item())
        history = dense_to_jagged(embeddings, offsets, total)
        times = dense_to_jagged(timestamps.unsqueeze(-1), offsets, total).squeeze(-1)
        if self.sem is not None:
            history = self.sem(history, offsets, times)
        if self.positional_encoder is not None:
            history = self._add_positions(history, offsets, times)
        if self.training and torch.is_grad_enabled():
            history = history + self._zero()
        length = embeddings.shape[1]
        padded = jagged_to_padded_dense(history.to(embeddings.dtype), offsets, length)
        inside = torch.arange(length, device=lengths.device) < lengths.unsqueeze(1)
        return torch.where(inside.unsqueeze(-1), padded, embeddings)

    def _add_positions(self, history: Tensor, offsets: Tensor, times: Tensor) -> Tensor:
        assert self.positional_encoder is not None
        encoded, _ = self.positional_encoder(
            history_embeddings=history * self.position_scale,
            history_offsets=offsets,
            history_timestamps=times,
            candidate_embeddings=history[:0],
            candidate_offsets=torch.zeros_like(offsets),
            candidate_timestamps=times[:0],
        )
        scaled: Tensor = encoded / self.position_scale  # the host multiplies by it again
        return scaled

    def _zero(self) -> Tensor:
        """A sum of 0 over all parameters of the slots, so that each has a gradient.

        The host's DistributedDataParallel stops at a parameter without gradient, and in a batch of
        single sessions the causal SEM uses none of its own.
        """
        slots = [module for module in (self.sem, self.positional_encoder) if module is not None]
        parts = [
            parameter.flatten()[:1].sum() * 0
            for slot in slots
            for parameter in slot.parameters()
            if parameter.requires_grad
        ]
        return torch.stack(parts).sum()


class _NoPositions(nn.Module):
    """Replaces the host's position table: all positions are zero."""

    def __init__(self, embedding_dim: int) -> None:
        super().__init__()
        self.register_buffer("row", torch.zeros(embedding_dim), persistent=False)

    def forward(self, index: Tensor) -> Tensor:
        """`[B, N]` -> zeros `[B, N, D]`."""
        row: Tensor = self.get_buffer("row")
        return row.expand(*index.shape, row.shape[0])


def _take_positions_out(host_preprocessor: Any) -> float:
    """Remove the host's positions.

    Returns:
        The host's factor on embeddings, sqrt(D).

    Raises:
        SlotError: Not the preprocessor that `train_fn` builds by default.
    """
    known = input_features_preprocessors.LearnablePositionalEmbeddingInputFeaturesPreprocessor
    if type(host_preprocessor) is not known:
        raise SlotError(
            f"positional_encoder replaces the positions of {known.__name__}, "
            f"got a {type(host_preprocessor).__name__}, whose tokens are not the history's items"
        )
    embedding_dim = int(host_preprocessor._embedding_dim)
    host_preprocessor._pos_emb = _NoPositions(embedding_dim)
    return math.sqrt(embedding_dim)
