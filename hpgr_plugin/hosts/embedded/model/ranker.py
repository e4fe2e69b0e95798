"""HSTURanker: the embedded host's ranking model, with a slot for every HPGR component."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hpgr_plugin.components.attention_hooks import (
    AttentionHook,
    HookInputs,
    PreferenceGuidedSparseAttention,
)
from hpgr_plugin.components.positions import TimeAwarePositionalEncoder, count_earlier
from hpgr_plugin.components.sem import SessionEnhancementModule
from hpgr_plugin.data.batch import Batch
from hpgr_plugin.hosts.embedded.model.encoder import LAYERS, SequenceEncoder
from hpgr_plugin.hosts.embedded.model.features import ItemFeatures, UserFeatureTokens
from hpgr_plugin.hosts.embedded.model.positions import LearnedPositionalEncoder
from hpgr_plugin.hosts.embedded.model.tokens import (
    NEVER_SEEN,
    Domain,
    Tokens,
    TokenSequence,
    concatenate,
)
from hpgr_plugin.ops.jagged import ranges, segment_ids, segment_positions
from hpgr_plugin.ops.preference_plan.plan import PreferencePlan
from hpgr_plugin.transfer.handoff import Handoff, load_handoff, load_sem_state


class SlotError(TypeError):
    """A slot holds the wrong kind of thing."""


class HSTURanker(nn.Module):
    """Ranks a user's candidates by their history: HSTU or MTGR layers, then an MLP.

    Actions mark history tokens, user features are context tokens, item features are added to
    their item's tokens. Candidates of one user never see each other, nor history at or after
    their own time (unless the positional encoder says ``hide_future=False``).

    Args:
        num_items: ``V``, rows of the item table.
        num_actions: distinct history actions.
        vocabulary_digest: digest of the item vocabulary, held against that of ``pretrained``.
        user_feature_sizes: user feature name -> number of codes.
        item_feature_codes: item feature name -> ``[V]`` codes.
        embedding_dim: ``D``.
        num_layers: encoder depth.
        num_heads: attention heads.
        layer: ``"hstu"`` or ``"mtgr"``.
        max_history: longest history; also the ``n`` of the attention's ``1 / n``.
        dropout: on the tokens, and inside the encoder.
        relative_bias: bias the attention by relative position and time.
        use_actions: mark history tokens with their actions.
        sem: slot, a :class:`SessionEnhancementModule` or None.
        positional_encoder: slot, a :class:`TimeAwarePositionalEncoder`; None for the host's own.
        attention_hook: slot, an :class:`AttentionHook` (PGSA, stochastic length) or None.
        pretrained: slot, path of a stage-1 hand-over, or None.
        inherited_lr_ratio: learning-rate ratio of what ``pretrained`` brought.

    Raises:
        SlotError: a slot holds the wrong kind of thing.
        HandoffError: ``pretrained`` belongs to another vocabulary, size or version.
    """

    def __init__(
        self,
        *,
        num_items: int,
        num_actions: int,
        vocabulary_digest: str,
        user_feature_sizes: Mapping[str, int] | None = None,
        item_feature_codes: Mapping[str, Tensor] | None = None,
        embedding_dim: int = 64,
        num_layers: int = 4,
        num_heads: int = 2,
        layer: str = "hstu",
        max_history: int = 400,
        dropout: float = 0.1,
        relative_bias: bool = True,
        use_actions: bool = True,
        sem: SessionEnhancementModule | None = None,
        positional_encoder: TimeAwarePositionalEncoder | None = None,
        attention_hook: AttentionHook | None = None,
        pretrained: str | None = None,
        inherited_lr_ratio: float = 0.1,
    ) -> None:
        super().__init__()
        if layer not in LAYERS:
            raise ValueError(f"hpgr.HSTURanker.layer takes one of {sorted(LAYERS)}, got {layer!r}")
        _check_slot("sem", sem, SessionEnhancementModule)
        _check_slot("positional_encoder", positional_encoder, TimeAwarePositionalEncoder)
        _check_slot("attention_hook", attention_hook, AttentionHook)
        self.layer = layer
        self.inherited_lr_ratio = inherited_lr_ratio
        self.item_table = nn.Embedding(num_items, embedding_dim)
        nn.init.normal_(self.item_table.weight, std=0.02)
        self.action_table = nn.Embedding(num_actions, embedding_dim) if use_actions else None
        if self.action_table is not None:
            nn.init.normal_(self.action_table.weight, std=0.02)
        self.user_features = (
            UserFeatureTokens(user_feature_sizes, embedding_dim) if user_feature_sizes else None
        )
        self.item_features = (
            ItemFeatures(item_feature_codes, embedding_dim) if item_feature_codes else None
        )
        self.positional_encoder = positional_encoder or LearnedPositionalEncoder(
            embedding_dim=embedding_dim, max_positions=max_history
        )
        self.hide_future = positional_encoder is None or positional_encoder.hide_future
        self.input_scale = embedding_dim**0.5
        self.input_dropout = nn.Dropout(dropout)
        self.sem = sem
        self.attention_hook = attention_hook
        self.encoder = SequenceEncoder(
            layer=layer,
            embedding_dim=embedding_dim,
            num_layers=num_layers,
            num_heads=num_heads,
            dropout=dropout,
            norm_length=max_history,
            relative_bias=relative_bias,
        )
        self.head = nn.Sequential(
            nn.LayerNorm(embedding_dim),
            nn.Linear(embedding_dim, embedding_dim),
            nn.SiLU(),
            nn.Linear(embedding_dim, 1),
        )
        self.inherited: tuple[str, ...] = ()
        if pretrained is not None:
            self._inherit(
                load_handoff(
                    pretrained,
                    num_items=num_items,
                    embedding_dim=embedding_dim,
                    vocabulary_digest=vocabulary_digest,
                )
            )
        if getattr(attention_hook, "table", None) == "frozen":
            assert isinstance(attention_hook, PreferenceGuidedSparseAttention)
            attention_hook.freeze(self.item_table.weight)

    def _inherit(self, handoff: Handoff) -> None:
        """Take over the item table and, where both sides have one, SEM."""
        with torch.no_grad():
            self.item_table.weight.copy_(handoff.item_table)
        self.inherited = ("item_table",)
        if self.sem is not None and handoff.sem_state is not None:
            load_sem_state(self.sem, handoff)
            self.inherited += ("sem",)

    def forward(self, batch: Batch) -> Tensor:
        """Logits ``[C]`` of the batch's candidates."""
        history_rows = self.item_table(batch.history_items)
        candidate_rows = self.item_table(batch.candidate_items)
        plan = self.plan(batch, history_rows, candidate_rows)
        history, candidates = self._embed(batch, history_rows, candidate_rows)
        sequence, row_plan = self._sequence(batch, history, candidates, plan)
        hook = self.attention_hook
        encoded = self.encoder(
            sequence,
            mask_position="post" if hook is None else hook.mask_position,
            use_column_weights=plan is not None and row_plan is None,
            row_plan=row_plan,
        )
        return self.head(encoded).squeeze(1)

    def plan(
        self, batch: Batch, history_rows: Tensor, candidate_rows: Tensor
    ) -> PreferencePlan | None:
        """What the attention hook keeps of the batch's histories; None for all."""
        if self.attention_hook is None:
            return None
        return self.attention_hook.plan(
            HookInputs(
                history_embeddings=history_rows.detach(),
                candidate_embeddings=candidate_rows.detach(),
                history_offsets=batch.history_offsets,
                candidate_offsets=batch.candidate_offsets,
                history_timestamps=batch.history_timestamps,
                candidate_timestamps=batch.candidate_timestamps if self.hide_future else None,
                history_ids=batch.history_items,
                candidate_ids=batch.candidate_items,
            )
        )

    def _embed(
        self, batch: Batch, history_rows: Tensor, candidate_rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Positions, then sessions, then what only this host knows: actions and features."""
        history, candidates = self.positional_encoder(
            history_rows,
            batch.history_offsets,
            batch.history_timestamps,
            candidate_rows,
            batch.candidate_offsets,
            batch.candidate_timestamps,
        )
        if self.sem is not None:
            history = self.sem(history, batch.history_offsets, batch.history_timestamps)
        if self.action_table is not None:
            history = history + self.action_table(batch.history_actions)
        if self.item_features is not None:
            history = history + self.item_features(batch.history_items)
            candidates = candidates + self.item_features(batch.candidate_items)
        return self._scaled(history), self._scaled(candidates)

    def _scaled(self, tokens: Tensor) -> Tensor:
        """Tables live near 0.02; without the factor the first layer's output would drown them."""
        return self.input_dropout(tokens * self.input_scale)

    def _sequence(
        self, batch: Batch, history: Tensor, candidates: Tensor, plan: PreferencePlan | None
    ) -> tuple[TokenSequence, PreferencePlan | None]:
        """The encoder's tokens; for the candidate layout also the plan over those tokens."""
        earlier = _earlier(batch)
        seen = earlier if self.hide_future else _whole_history(batch)
        history_tokens = self._history_tokens(batch, history, seen)
        candidate_tokens = _candidate_tokens(batch, candidates, earlier=earlier, seen=seen)
        users = batch.history_offsets.numel() - 1
        history_lengths, candidate_lengths = (
            batch.history_offsets.diff(),
            batch.candidate_offsets.diff(),
        )
        owner = torch.arange(users, device=history.device)
        layout = self.attention_hook.layout if plan is not None else "dense"  # type: ignore[union-attr]
        if plan is not None and layout in ("per_candidate", "per_user"):
            history_tokens = history_tokens.select(plan.index)
            history_tokens.weights = plan.weights
            history_lengths = plan.offsets.diff()
        if layout == "per_candidate":
            owner = segment_ids(batch.candidate_offsets, candidates.shape[0])
            candidate_lengths = torch.ones_like(owner)
        parts = [(history_tokens, history_lengths), (candidate_tokens, candidate_lengths)]
        context = self._context(batch, owner)
        sequence = concatenate(parts if context is None else [context, *parts])
        if plan is None or layout != "shared_history":
            return sequence, None
        return sequence, self._plan_over_tokens(batch, plan, sequence)

    def visible(self, batch: Batch) -> Tensor:
        """How many history items each candidate may see, ``[C]``; they are the first ones."""
        return _earlier(batch) if self.hide_future else _whole_history(batch)

    def _history_tokens(self, batch: Batch, history: Tensor, seen: Tensor) -> Tokens:
        rank = segment_positions(batch.history_offsets, history.shape[0])
        key, query = rank, rank
        domains = torch.full_like(rank, int(Domain.HISTORY))
        if self.layer == "mtgr":
            # What every candidate may see is static: fully connected. Later items are real-time.
            shared = _least(seen, batch.candidate_offsets, batch.history_offsets.diff())
            static = rank < shared[segment_ids(batch.history_offsets, history.shape[0])]
            key = torch.where(static, -1, rank)
            query = torch.where(static, 0, rank)
            domains = torch.where(static, int(Domain.HISTORY), int(Domain.REALTIME))
        return Tokens(
            values=history,
            positions=rank + 1,
            timestamps=batch.history_timestamps,
            key_order=key,
            query_order=query,
            domains=domains,
            weights=torch.ones_like(rank, dtype=torch.float32),
        )

    def _context(self, batch: Batch, owner: Tensor) -> tuple[Tokens, Tensor] | None:
        """The context tokens of the users ``owner [S]``, and how many each sequence has."""
        if self.user_features is None:
            return None
        per_user = self.user_features.tokens_per_user
        lengths = torch.full_like(owner, per_user)
        rows = ranges(owner * per_user, lengths)
        zeros = torch.zeros_like(rows)
        tokens = Tokens(
            values=self._scaled(self.user_features(batch.user_features)).index_select(0, rows),
            positions=zeros,
            timestamps=zeros,  # no time of its own: one far bucket of the bias for all
            key_order=zeros - 1,
            query_order=zeros,
            domains=zeros + int(Domain.CONTEXT),
            weights=torch.ones_like(rows, dtype=torch.float32),
        )
        return tokens, lengths

    def _plan_over_tokens(
        self, batch: Batch, plan: PreferencePlan, sequence: TokenSequence
    ) -> PreferencePlan:
        """``plan`` with indices into the sequence's tokens instead of the flat history."""
        per_user = 0 if self.user_features is None else self.user_features.tokens_per_user
        user = segment_ids(batch.history_offsets, batch.history_items.numel())
        shift = sequence.offsets[:-1] + per_user - batch.history_offsets[:-1]
        return plan._replace(index=plan.index + shift[user[plan.index]])


def _earlier(batch: Batch) -> Tensor:
    """History items strictly before each candidate, ``[C]``: Eq. 4's index less one."""
    return count_earlier(
        batch.history_timestamps,
        batch.history_offsets,
        batch.candidate_timestamps,
        batch.candidate_offsets,
    )


def _whole_history(batch: Batch) -> Tensor:
    """Length of each candidate's history, ``[C]``."""
    owner = segment_ids(batch.candidate_offsets, batch.num_candidates)
    return batch.history_offsets.diff()[owner]


def _candidate_tokens(batch: Batch, candidates: Tensor, *, earlier: Tensor, seen: Tensor) -> Tokens:
    return Tokens(
        values=candidates,
        positions=earlier + 1,
        timestamps=batch.candidate_timestamps,
        key_order=torch.full_like(seen, NEVER_SEEN),
        query_order=seen,
        domains=torch.full_like(seen, int(Domain.CANDIDATE)),
        weights=torch.ones_like(seen, dtype=torch.float32),
    )


def _least(values: Tensor, offsets: Tensor, default: Tensor) -> Tensor:
    """Smallest of ``values`` in each segment; ``default [B]`` where a segment is empty."""
    owner = segment_ids(offsets, values.numel())
    return default.scatter_reduce(0, owner, values, reduce="amin", include_self=True)


def _check_slot(name: str, value: Any, kind: type) -> None:
    if value is not None and not isinstance(value, kind):
        raise SlotError(
            f"hpgr.HSTURanker.{name} takes @hpgr.{kind.__name__}() or None, "
            f"got {type(value).__name__}"
        )
