"""SlateModel: from a user's history to a slate, with a slot for the decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hpgr_plugin.components.checks import check_at_least, check_share
from hpgr_plugin.components.sem import SessionEnhancementModule
from hpgr_plugin.components.slates.alignment import SlateLogProbs
from hpgr_plugin.components.slates.beam import Allowed
from hpgr_plugin.components.slates.blocks import Context
from hpgr_plugin.components.slates.decoder import DecoderSizes, SlateDecoder, Slates
from hpgr_plugin.components.slates.semantic_ids import SemanticIds
from hpgr_plugin.components.transformer import INIT_STD
from hpgr_plugin.data.batch import Batch
from hpgr_plugin.errors import HpgrError
from hpgr_plugin.hosts.embedded.slates.context import ContextEncoder, Encoder
from hpgr_plugin.hosts.slots import SlotError, check_slot, check_width
from hpgr_plugin.ops.item_softmax import mean_cross_entropy
from hpgr_plugin.ops.jagged import jagged_to_padded_dense, segment_ids, segment_positions
from hpgr_plugin.transfer.handoff import inherit

_NAME = "hpgr.SlateModel"


class SlateModel(nn.Module):
    """A context encoder over the history, and a decoder of slates.

    A history token is the item's row of the table (inherited from stage 1), its summed digits, its
    action and its place counted from the end. Without a decoder items are scored against the state
    of the last token and the best M are the slate: SASRec and HSTU as next-item models.

    Args:
        num_items: V.
        num_actions: distinct history actions.
        vocabulary_digest: digest of the item vocabulary, compared with that of `pretrained`.
        ids: semantic ids of the items; None without a decoder.
        decoder_arguments: of the decoder, over what gin binds: for a model that is loaded.
        embedding_dim: D.
        num_heads: attention heads, in all parts.
        encoder: of the context, "hstu" or "transformer".
        encoder_layers: its depth.
        decoder: slot, a `SlateDecoder` class, or None.
        slate_size: M.
        beam_width: of generation.
        max_history: longest history.
        dropout: on the tokens, and inside all parts.
        exclude_history: leave items of the history out of slates; right where nobody takes an
            item twice, as in MovieLens.
        sem: slot, a `SessionEnhancementModule` or None.
        pretrained: slot, path of a stage-1 hand-over, or None.
        inherited_lr_ratio: learning-rate ratio of what `pretrained` brought.

    Raises:
        SlotError: a slot holds the wrong kind of thing.
        HandoffError: `pretrained` belongs to another vocabulary, size or version.
    """

    def __init__(
        self,
        *,
        num_items: int,
        num_actions: int,
        vocabulary_digest: str,
        ids: SemanticIds | None = None,
        decoder_arguments: Mapping[str, Any] | None = None,
        embedding_dim: int = 64,
        num_heads: int = 2,
        encoder: Encoder = "hstu",
        encoder_layers: int = 2,
        decoder: type[SlateDecoder] | None = None,
        slate_size: int = 5,
        beam_width: int = 5,
        max_history: int = 400,
        dropout: float = 0.1,
        exclude_history: bool = True,
        sem: SessionEnhancementModule | None = None,
        pretrained: str | None = None,
        inherited_lr_ratio: float = 0.1,
    ) -> None:
        super().__init__()
        check_slot(_NAME, "sem", sem, SessionEnhancementModule)
        check_at_least(1, slate_size=slate_size, beam_width=beam_width, num_actions=num_actions)
        check_share(dropout=dropout)
        if sem is not None:
            check_width(_NAME, "sem", sem.embedding_dim, expected=embedding_dim, of="the model")
            sem.refuse_tokens(_NAME)
            sem.decide_causal(False, "")  # a slate's history ends before its first item
        if num_items < slate_size:
            raise HpgrError(f"{_NAME}.slate_size takes at most {num_items}, got {slate_size}")
        self.settings: dict[str, Any] = {
            "num_items": num_items,
            "num_actions": num_actions,
            "vocabulary_digest": vocabulary_digest,
            "embedding_dim": embedding_dim,
            "num_heads": num_heads,
            "encoder": encoder,
            "encoder_layers": encoder_layers,
            "slate_size": slate_size,
            "beam_width": beam_width,
            "max_history": max_history,
            "dropout": dropout,
            "exclude_history": exclude_history,
        }
        self.num_items, self.slate_size, self.beam_width = num_items, slate_size, beam_width
        self.max_history, self.exclude_history = max_history, exclude_history
        self.inherited_lr_ratio = inherited_lr_ratio
        self.item_table = nn.Embedding(num_items, embedding_dim)
        self.action_table = nn.Embedding(num_actions, embedding_dim)
        self.positions = nn.Embedding(max_history, embedding_dim)
        for table in (self.item_table, self.action_table, self.positions):
            nn.init.normal_(table.weight, std=INIT_STD)
        self.sem = sem
        self.input_scale, self.input_dropout = embedding_dim**0.5, nn.Dropout(dropout)
        self.context_encoder = ContextEncoder(
            encoder,
            embedding_dim=embedding_dim,
            num_heads=num_heads,
            num_layers=encoder_layers,
            dropout=dropout,
            max_history=max_history,
        )
        self.decoder: SlateDecoder | None = None
        if decoder is not None:
            if not (isinstance(decoder, type) and issubclass(decoder, SlateDecoder)):
                raise SlotError(
                    f"{_NAME}.decoder takes @hpgr.HierarchicalDecoder or another SlateDecoder, "
                    f"without brackets, got {decoder!r}"
                )
            if ids is None:
                raise SlotError(f"{_NAME}.decoder needs semantic ids (hpgr.SlateSettings.tokens)")
            self.decoder = decoder(
                ids=ids,
                sizes=DecoderSizes(
                    embedding_dim=embedding_dim,
                    num_heads=num_heads,
                    dropout=dropout,
                    slate_size=slate_size,
                ),
                **(decoder_arguments or {}),
            )
        self.inherited: tuple[str, ...] = ()
        if pretrained is not None:
            self.inherited = inherit(pretrained, self.item_table, sem, vocabulary_digest)
            if self.decoder is not None:
                self.decoder.start_from(self.item_table.weight)

    def context(self, batch: Batch) -> Context:
        """The encoded histories of a batch."""
        items, offsets = batch.history_items, batch.history_offsets
        history = self.item_table(items) + self.action_table(batch.history_actions)
        rank = segment_positions(offsets, len(items))
        from_end = offsets.diff()[segment_ids(offsets, len(items))] - 1 - rank
        if len(items) and int(from_end.max()) >= self.max_history:
            raise HpgrError(
                f"a history of {int(from_end.max()) + 1} items is longer than "
                f"{_NAME}.max_history = {self.max_history}"
            )
        history = history + self.positions(from_end)
        if self.sem is not None:
            history = self.sem(history, offsets, batch.history_timestamps)
        history = history * self.input_scale
        if self.decoder is not None:
            history = history + self.decoder.item_vectors(items)
        context: Context = self.context_encoder(self.input_dropout(history), batch)
        return context._replace(items=self.item_table.weight)

    def forward(self, batch: Batch) -> tuple[Tensor, int]:
        """The sum of -log P over the items of the batch's slates, and their number."""
        if self.decoder is None:
            return self._next_item_loss(batch)
        found = self.log_probs(batch, *padded_slates(batch, self.slate_size))
        return -found.total().sum(), batch.num_candidates

    def log_probs(self, batch: Batch, slates: Tensor, lengths: Tensor) -> SlateLogProbs:
        """The log-probabilities of slates `[B, M]`, of which the first `lengths` `[B]` slots count.

        Raises:
            HpgrError: there is no decoder.
        """
        return self.log_probs_of(self.context(batch), slates, lengths)

    def log_probs_of(self, context: Context, slates: Tensor, lengths: Tensor) -> SlateLogProbs:
        """`log_probs` for a context that is encoded already."""
        if self.decoder is None:
            raise HpgrError(f"{_NAME}.decoder is None: only a decoder gives slates a probability")
        slot = torch.arange(self.slate_size, device=slates.device)
        used = (slot < lengths.unsqueeze(1)).unsqueeze(2)
        counted = self.decoder.counted(slates) & used
        return SlateLogProbs(self.decoder.log_probs(context, slates), counted)

    def _next_item_loss(self, batch: Batch) -> tuple[Tensor, int]:
        """Next-item prediction at the last M tokens, so that every event is a target about once."""
        states = self.context(batch)
        count = batch.history_offsets.diff()
        slates, _ = padded_slates(batch, 1)
        # What follows the token at place p: history item p (the start token is at 0), or the slate.
        items = jagged_to_padded_dense(
            batch.history_items.unsqueeze(1), batch.history_offsets, states.tokens.shape[1]
        ).squeeze(2)
        items = items.scatter(1, count.unsqueeze(1), slates)
        place = torch.arange(items.shape[1], device=items.device)
        last = count.unsqueeze(1)
        read = (place <= last) & (place > last - self.slate_size)
        hidden, targets = states.tokens[read], items[read]
        found = mean_cross_entropy(hidden, self.item_table.weight, targets, None)
        return found.loss * len(targets), len(targets)

    @torch.no_grad()
    def generate(self, batch: Batch, *, width: int | None = None) -> Slates:
        """A slate for every request; the batch's candidates are not read.

        Args:
            batch: with the histories.
            width: of the beam search; None takes `beam_width`.
        """
        excluded = self._excluded(batch)
        context = self.context(batch)
        if self.decoder is not None:
            allowed = Allowed.all_but(self.decoder.ids, excluded, least=self.slate_size)
            return self.decoder.generate(context, allowed, width=width or self.beam_width)
        last = context.tokens[torch.arange(len(context.real)), context.real.sum(1) - 1]
        log_probs = (last @ self.item_table.weight.T).float().log_softmax(1)
        if excluded is not None:
            enough = (~excluded).sum(1, keepdim=True) >= self.slate_size
            log_probs = log_probs.masked_fill(excluded & enough, -torch.inf)
        best = log_probs.topk(self.slate_size, dim=1)
        return Slates(best.indices, best.values)

    def _excluded(self, batch: Batch) -> Tensor | None:
        """Items that a user may not be shown, bool `[B, V]`."""
        if not self.exclude_history:
            return None
        owner = segment_ids(batch.history_offsets, len(batch.history_items))
        excluded = torch.zeros(
            batch.num_requests, self.num_items, dtype=torch.bool, device=owner.device
        )
        excluded[owner, batch.history_items] = True
        return excluded


def padded_slates(batch: Batch, size: int) -> tuple[Tensor, Tensor]:
    """The candidates of each request as a slate `[B, size]`, item 0 behind the end, and lengths."""
    items = batch.candidate_items.unsqueeze(1)
    padded = jagged_to_padded_dense(items, batch.candidate_offsets, size).squeeze(2)
    return padded, batch.candidate_offsets.diff().clamp(max=size)


def padded_labels(batch: Batch, size: int) -> Tensor:
    """The labels of `padded_slates`, 0 behind the end, `[B, size]`."""
    labels = batch.candidate_labels.unsqueeze(1)
    return jagged_to_padded_dense(labels, batch.candidate_offsets, size).squeeze(2)
