"""HSTURanker: the embedded host's ranking model, with a slot for every HPGR component."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from hpgr_plugin.components.attention_hooks import (
    AttentionHook,
    HookInputs,
    PreferenceGuidedSparseAttention,
)
from hpgr_plugin.components.checks import check_at_least, check_choice, check_share
from hpgr_plugin.components.item_features import ItemFeatures
from hpgr_plugin.components.positions import (
    PositionPlan,
    TimeAwarePositionalEncoder,
    VisibilityCheck,
)
from hpgr_plugin.components.sem import SessionEnhancementModule, SessionPlan
from hpgr_plugin.components.sharded_table import RowShardedTable, Tables, build_sharded_table
from hpgr_plugin.data.batch import Batch
from hpgr_plugin.errors import HpgrError
from hpgr_plugin.hosts.embedded.model.encoder import SequenceEncoder
from hpgr_plugin.hosts.embedded.model.features import (
    ItemOdds,
    OddsNetwork,
    UserFeatureTokens,
)
from hpgr_plugin.hosts.embedded.model.hstu import HSTULayer, SequenceLayer
from hpgr_plugin.hosts.embedded.model.positions import LearnedPositionalEncoder
from hpgr_plugin.hosts.embedded.model.rare_items import RareItems
from hpgr_plugin.hosts.embedded.model.rivals.interface import (
    RivalEncoder,
    RivalSizes,
    RivalTokens,
)
from hpgr_plugin.hosts.embedded.model.task_heads import TaskHeads, chosen_tasks, make_head
from hpgr_plugin.hosts.embedded.model.token_features import FeatureSizes, TokenFeatures
from hpgr_plugin.hosts.embedded.model.tokens import (
    RequestIndex,
    SequenceIndex,
    build_sequence,
    with_plan,
)
from hpgr_plugin.hosts.slots import SlotError, check_slot, check_width
from hpgr_plugin.ops.preference_plan import PreferencePlan
from hpgr_plugin.transfer.handoff import inherit

_NAME = "hpgr.HSTURanker"
_TABLE_STD = 0.02
Statistics = Literal["linear", "network"]
PositionalEncoder = LearnedPositionalEncoder | TimeAwarePositionalEncoder


class RequestPlan(NamedTuple):
    """What a ranker knows of a batch without its weights: checked once, sizes as numbers.

    Made on the host and moved to a CUDA device with the batch, it leaves nothing to wait for.

    Attributes:
        requests: index arithmetic of the requests.
        positions: of the positional encoder, or None.
        sessions: of SEM, or None.
        sequence: of the layers' tokens; None for a rival.
        rival: what `RivalEncoder.plan` makes; None for layers.
    """

    requests: RequestIndex
    positions: PositionPlan | None
    sessions: SessionPlan | None
    sequence: SequenceIndex | None
    rival: Any


class HSTURanker(nn.Module):
    """Ranks a user's candidates by their history: HSTU or MTGR layers, then an MLP.

    Actions mark history tokens, user features are context tokens, item features are added to
    their item's tokens. Candidates of one user never see each other, nor history at or after
    their own time (unless the positional encoder says `hide_future=False`).

    Args:
        num_items: `V`, rows of the item table.
        num_actions: distinct history actions.
        vocabulary_digest: digest of the item vocabulary, compared with that of `pretrained`.
        user_feature_sizes: user feature name -> number of codes.
        item_feature_codes: item feature name -> `[V]` codes.
        item_counts: `[V]`, training events of every item, for `rare_items`.
        task_names: further tasks of the data, whose labels its batches have.
        embedding_dim: `D`.
        num_layers: encoder depth.
        num_heads: attention heads.
        layer: the encoder's layer class, `HSTULayer` or `MTGRLayer`.
        encoder: a `RivalEncoder` class in place of the layers, with its own depth and positions;
            None for layers.
        max_history: longest history; also the `n` of the attention's `1 / n`.
        dropout: on the tokens, and inside the encoder.
        relative_bias: bias the attention by relative position and time.
        use_actions: mark history tokens with their actions.
        statistics: how often things were liked before the candidate's time, in the training events
            (`CandidateStatistics`): "linear" adds the item's log odds to the logits (`ItemOdds`),
            "network" those of item and user to the candidate (`OddsNetwork`). None: not read.
        item_bias: add a learned number per item to the logits.
        tasks: further tasks that get a head of their own; None: all of the data's. The statistics'
            "linear" form is of the main task's label and is added to its logits only.
        rare_items: the class `RareItems`, or None: every item has its row of the table.
        token_features: classes of what is added to the tokens besides.
        sem: slot, a `SessionEnhancementModule` or None.
        positional_encoder: slot, a `TimeAwarePositionalEncoder`; None for the host's own.
        attention_hook: slot, an `AttentionHook` (PGSA, stochastic length) or None.
        pretrained: slot, path of a stage-1 hand-over, or None.
        inherited_lr_ratio: learning-rate ratio of what `pretrained` brought.
        max_blind_share: of the candidates that have a history, the share that may see nothing of
            it in the first batches, because all of it is at or after their own time.
        tables: "dense" holds the whole item table in every process. "torchrec" divides its rows
            among the processes by torchrec, "rows" without it: both for tables that no single GPU
            holds. All processes then call `forward` at the same time; PGSA that scores on a frozen
            copy of the table takes "dense".

    Raises:
        HpgrError: an argument out of its range, or a hook that takes a dense table.
        SlotError: a slot holds the wrong kind of thing.
        HandoffError: `pretrained` belongs to another vocabulary, size or version.
    """

    def __init__(
        self,
        *,
        num_items: int,
        num_actions: int,
        vocabulary_digest: str,
        user_feature_sizes: Mapping[str, int] | None = None,
        item_feature_codes: Mapping[str, Tensor] | None = None,
        item_counts: Tensor | None = None,
        task_names: Sequence[str] = (),
        embedding_dim: int = 64,
        num_layers: int = 4,
        num_heads: int = 2,
        layer: type[SequenceLayer] = HSTULayer,
        encoder: type[RivalEncoder] | None = None,
        max_history: int = 400,
        dropout: float = 0.1,
        relative_bias: bool = True,
        use_actions: bool = True,
        statistics: Statistics | None = None,
        item_bias: bool = False,
        tasks: Sequence[str] | None = None,
        rare_items: type[RareItems] | None = None,
        token_features: Sequence[type[TokenFeatures]] = (),
        sem: SessionEnhancementModule | None = None,
        positional_encoder: TimeAwarePositionalEncoder | None = None,
        attention_hook: AttentionHook | None = None,
        pretrained: str | None = None,
        inherited_lr_ratio: float = 0.1,
        max_blind_share: float = 0.5,
        tables: Tables = "dense",
    ) -> None:
        super().__init__()
        if not (isinstance(layer, type) and issubclass(layer, SequenceLayer)):
            raise SlotError(
                f"{_NAME}.layer takes @hpgr.HSTULayer, @hpgr.MTGRLayer or another "
                f"SequenceLayer, without brackets, got {layer!r}"
            )
        _check_classes("token_features", token_features, TokenFeatures)
        _check_classes("rare_items", () if rare_items is None else (rare_items,), RareItems)
        _check_classes("encoder", () if encoder is None else (encoder,), RivalEncoder)
        check_slot(_NAME, "sem", sem, SessionEnhancementModule)
        check_slot(_NAME, "positional_encoder", positional_encoder, TimeAwarePositionalEncoder)
        check_slot(_NAME, "attention_hook", attention_hook, AttentionHook)
        check_at_least(
            1,
            embedding_dim=embedding_dim,
            num_layers=num_layers,
            num_heads=num_heads,
            max_history=max_history,
        )
        check_share(dropout=dropout)
        check_choice(get_args(Tables), tables=tables)
        _check_tables(tables, attention_hook)
        if statistics not in (None, *get_args(Statistics)):
            raise SlotError(
                f"{_NAME}.statistics takes 'linear', 'network' or None, got {statistics!r}"
            )
        self.max_history = max_history
        for name, slot in (("sem", sem), ("positional_encoder", positional_encoder)):
            if slot is not None:
                check_width(
                    _NAME, name, slot.embedding_dim, expected=embedding_dim, of="the ranker"
                )
        self.dynamic_mask = layer.dynamic_mask
        self.inherited_lr_ratio = inherited_lr_ratio
        self.item_table = _item_table(tables, num_items, embedding_dim)
        self.action_table = nn.Embedding(num_actions, embedding_dim) if use_actions else None
        if self.action_table is not None:
            nn.init.normal_(self.action_table.weight, std=0.02)
        self.user_features = (
            UserFeatureTokens(user_feature_sizes, embedding_dim) if user_feature_sizes else None
        )
        self.item_features = (
            ItemFeatures(item_feature_codes, embedding_dim) if item_feature_codes else None
        )
        sizes = FeatureSizes(
            embedding_dim=embedding_dim,
            num_actions=num_actions,
            item_feature_codes=item_feature_codes or {},
            item_counts=item_counts,
        )
        self.rare_items = None if rare_items is None else rare_items(sizes=sizes)
        self.token_features = nn.ModuleList(kind(sizes=sizes) for kind in token_features)
        if positional_encoder is None and encoder is None:
            self.positional_encoder: PositionalEncoder | None = LearnedPositionalEncoder(
                embedding_dim=embedding_dim, max_positions=max_history
            )
        else:
            self.positional_encoder = positional_encoder
        self.hide_future = positional_encoder is None or positional_encoder.hide_future
        self._visibility = VisibilityCheck(
            times="candidate_timestamps",
            binding="hpgr.TimeAwarePositionalEncoder.hide_future = False",
            max_blind_share=max_blind_share,
        )
        self.input_scale = embedding_dim**0.5
        self.input_dropout = nn.Dropout(dropout)
        self.sem = sem
        self.attention_hook = attention_hook
        self.encoder: SequenceEncoder | RivalEncoder
        if encoder is None:
            _check_bias(positional_encoder, relative_bias)
            self.encoder = SequenceEncoder(
                layer,
                num_layers,
                embedding_dim=embedding_dim,
                num_heads=num_heads,
                dropout=dropout,
                norm_length=max_history,
                relative_bias=relative_bias,
            )
        else:
            _check_rival(encoder, attention_hook, positional_encoder)
            if sem is not None:
                sem.refuse_tokens(f"{_NAME}.encoder = @hpgr.{encoder.__name__}")
            self.encoder = encoder(
                sizes=RivalSizes(
                    embedding_dim=embedding_dim,
                    num_heads=num_heads,
                    dropout=dropout,
                    max_history=max_history,
                )
            )
        self.head = make_head(embedding_dim)
        self.reads_statistics = statistics is not None
        self.item_odds = ItemOdds() if statistics == "linear" else None
        self.odds_network = OddsNetwork(embedding_dim) if statistics == "network" else None
        self.item_bias = nn.Embedding(num_items, 1) if item_bias else None
        if self.item_bias is not None:
            nn.init.zeros_(self.item_bias.weight)
        # After all else: the main task starts from the same weights with and without others.
        self.task_heads = TaskHeads(
            chosen_tasks(f"{_NAME}.tasks", tasks, task_names),
            embedding_dim=embedding_dim,
            num_items=num_items if item_bias else None,
        )
        self.inherited: tuple[str, ...] = ()
        if pretrained is not None:
            self.inherited = inherit(
                pretrained, self.item_table, sem, vocabulary_digest, self.item_features
            )
        if _scores_on_frozen_table(attention_hook):
            assert isinstance(attention_hook, PreferenceGuidedSparseAttention)
            assert isinstance(self.item_table, nn.Embedding)
            attention_hook.freeze(self.item_table.weight)

    @property
    def task_names(self) -> tuple[str, ...]:
        """The tasks besides the main one."""
        return self.task_heads.names

    @torch.no_grad()
    def plan_requests(self, batch: Batch, *, device_type: str | None = None) -> RequestPlan:
        """Check a batch, and do the index arithmetic of `forward` where the batch is.

        Args:
            batch: the requests.
            device_type: where `forward` will run, see `segment_layout`; None: where the batch is.

        Raises:
            ValueError: requests that the positional encoder or SEM refuses.
        """
        index = RequestIndex.of(batch, hide_future=self.hide_future)
        times = (
            batch.history_offsets,
            batch.history_timestamps,
            batch.candidate_offsets,
            batch.candidate_timestamps,
        )
        encoder, sessions, before = self.positional_encoder, None, None
        positions = None if encoder is None else encoder.plan(*times)
        if self.sem is not None:
            sessions = self.sem.plan(*times[:2], device_type=device_type)
            if sessions.later is not None:
                before = sessions.session_offsets[sessions.later]
        context_len = 0 if self.user_features is None else self.user_features.tokens_per_user
        if isinstance(self.encoder, RivalEncoder):
            rival = self.encoder.plan(
                batch, index, context_len=context_len, device_type=device_type
            )
            return RequestPlan(index, positions, sessions, None, rival)
        sequence = SequenceIndex.of(
            batch,
            index,
            context_len=context_len,
            dynamic_mask=self.dynamic_mask,
            layout=None if self.attention_hook is None else self.attention_hook.layout,
            before=before,
        )
        return RequestPlan(index, positions, sessions, sequence, None)

    def forward(
        self, batch: Batch, *, every_task: bool = False, plan: RequestPlan | None = None
    ) -> Tensor:
        """Logits of the batch's candidates: the paper's Figure 2, top to bottom.

        Args:
            batch: the requests.
            every_task: of all tasks, `[1 + tasks, C]`, the main one first; else of that `[C]`.
            plan: of the same requests, see `plan_requests`; None makes it here.
        """
        plan = self.plan_requests(batch) if plan is None else plan
        index = plan.requests
        if self.hide_future and self.training and not self._visibility.done:
            self._visibility(index.visible, batch.history_offsets.diff()[index.candidate_users])
        history, candidates = self.embed_requests(batch)
        kept = self.plan(batch, history, candidates, index)  # Eq. 5, on the raw item embeddings
        if self.positional_encoder is not None:  # Eq. 4
            history, candidates = self.positional_encoder(
                history,
                batch.history_offsets,
                batch.history_timestamps,
                candidates,
                batch.candidate_offsets,
                batch.candidate_timestamps,
                plan=plan.positions,
            )
        session_tokens = None
        if self.sem is not None:  # Eq. 1 and 2
            sessions = self.sem.context(
                history, batch.history_offsets, batch.history_timestamps, plan=plan.sessions
            )
            history = self.sem.fuse(history, sessions)
            if self.sem.session_tokens:
                session_tokens = self._scaled(
                    self.sem.tokens(sessions, batch.history_offsets, plan=plan.sessions).values
                )
        history, candidates, context = self._add_features(batch, index, history, candidates)
        if isinstance(self.encoder, RivalEncoder):
            if context is not None:
                context = context.unflatten(0, (batch.num_requests, -1))
            encoded = self.encoder(
                RivalTokens(batch, index, history, candidates, context, plan.rival)
            )
        else:
            tokens = (history, candidates, context)
            encoded = self._encode_sequences(
                self.encoder, batch, plan, tokens, kept, session_tokens
            )
        if self.odds_network is not None:
            encoded = encoded + self.odds_network(batch.candidate_features)
        logits: Tensor = self.head(encoded).squeeze(1)  # Eq. 6 takes their sigmoid
        if self.item_odds is not None:
            logits = logits + self.item_odds(batch.candidate_features)
        if self.item_bias is not None:
            logits = logits + self.item_bias(batch.candidate_items).squeeze(1)
        if not every_task:
            return logits
        return torch.stack([logits, *self.task_heads.logits(encoded, batch.candidate_items)])

    def _encode_sequences(
        self,
        encoder: SequenceEncoder,
        batch: Batch,
        plan: RequestPlan,
        tokens: tuple[Tensor, Tensor, Tensor | None],
        kept: PreferencePlan | None,
        session_tokens: Tensor | None,
    ) -> Tensor:
        """The candidates `[C, D]` after the layers; tokens: history, candidates, context."""
        history, candidates, context = tokens
        hook, where = self.attention_hook, plan.sequence
        assert where is not None
        sequence = build_sequence(
            batch,
            plan.requests,
            where,
            history=history,
            candidates=candidates,
            context=context,
            session_tokens=session_tokens,
        )
        if hook is not None and kept is not None:
            longest = None
            if hook.layout != "shared_history" and kept.offsets.is_cuda:
                longest = hook.longest_row(kept, plan.requests.longest_history)
            sequence = with_plan(sequence, kept, where, layout=hook.layout, longest_row=longest)
        encoded: Tensor = encoder(
            sequence, mask_position="post" if hook is None else hook.mask_position
        )
        return encoded

    def _scaled(self, tokens: Tensor) -> Tensor:
        """Tokens as the encoder takes them, see `_add_features`."""
        scaled: Tensor = self.input_dropout(tokens * self.input_scale)
        return scaled

    def embed_requests(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The embeddings of a batch's history items `[T, D]` and candidates `[C, D]`.

        A sharded table is asked once for both, by all processes together. In `forward` nothing with
        a gradient comes before: the backward of the look-up, in which the processes exchange rows,
        then comes after all gradients that DDP reduces. So the collectives have the same order in
        all processes, also where a batch lacks what others have.
        """
        items = batch.history_items, batch.candidate_items
        if not isinstance(self.item_table, RowShardedTable):
            return self.embed_items(items[0]), self.embed_items(items[1])
        rows = self.item_table(torch.cat(items))
        history, candidates = rows.split([len(items[0]), len(items[1])])
        return self._embedding_of(history, items[0]), self._embedding_of(candidates, items[1])

    def embed_items(self, items: Tensor) -> Tensor:
        """The embeddings of items `[L]`, `[L, D]`: what PGSA scores, and the tokens begin with."""
        return self._embedding_of(self.item_table(items), items)

    def _embedding_of(self, rows: Tensor, items: Tensor) -> Tensor:
        """The embeddings of items from their rows of the table, `[L, D]` both."""
        if self.rare_items is None:
            return rows
        features = None if self.item_features is None else self.item_features(items)
        embedded: Tensor = self.rare_items(rows, items, features)
        return embedded

    def plan(
        self,
        batch: Batch,
        history_rows: Tensor,
        candidate_rows: Tensor,
        index: RequestIndex,
    ) -> PreferencePlan | None:
        """What the attention hook keeps of the batch's histories; None for all.

        Args:
            batch: the requests.
            history_rows: `[T, D]`, embeddings of the history items.
            candidate_rows: `[C, D]`, of the candidates.
            index: of the same requests.
        """
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
                max_history=index.longest_history,
                max_candidates=index.most_candidates,
            )
        )

    def _add_features(
        self, batch: Batch, index: RequestIndex, history: Tensor, candidates: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Actions and item features on their tokens, user features as context tokens.

        Tables have a scale near 0.02; without the factor sqrt(D) the first layer's output would
        drown the tokens.
        """
        if self.action_table is not None:
            history = history + self.action_table(batch.history_actions)
        gated = self.rare_items is not None and self.rare_items.replaces_features
        if self.item_features is not None and not gated:
            history = history + self.item_features(batch.history_items)
            candidates = candidates + self.item_features(batch.candidate_items)
        for features in self.token_features:
            added = features(batch, index)
            history = history if added.history is None else history + added.history
            candidates = candidates if added.candidates is None else candidates + added.candidates
        history, candidates = self._scaled(history), self._scaled(candidates)
        if self.user_features is None:
            return history, candidates, None
        context = self.user_features(batch.user_features)
        return history, candidates, self._scaled(context)


def _item_table(
    tables: Tables, num_items: int, embedding_dim: int
) -> nn.Embedding | RowShardedTable:
    """A new table, whole or this process's part of it."""
    if tables != "dense":
        return build_sharded_table(
            tables, num_embeddings=num_items, embedding_dim=embedding_dim, std=_TABLE_STD
        )
    table = nn.Embedding(num_items, embedding_dim)
    nn.init.normal_(table.weight, std=_TABLE_STD)
    return table


def _scores_on_frozen_table(hook: AttentionHook | None) -> bool:
    return getattr(hook, "table", None) == "frozen"


def _check_tables(tables: Tables, hook: AttentionHook | None) -> None:
    """Raises `HpgrError` for a sharded table with a hook that copies the whole one."""
    if tables != "dense" and _scores_on_frozen_table(hook):
        raise HpgrError(
            f"hpgr.{type(hook).__name__}.table = 'frozen' takes {_NAME}.tables = 'dense', "
            f"got {tables!r}"
        )


def _check_classes(parameter: str, given: Sequence[object], kind: type) -> None:
    """Every given thing is a subclass of `kind`, not an instance.

    Raises:
        SlotError: naming the parameter and what it takes.
    """
    for value in given:
        if not (isinstance(value, type) and issubclass(value, kind)):
            raise SlotError(
                f"{_NAME}.{parameter} takes classes that are a {kind.__name__}, "
                f"written @hpgr.Name without brackets, got {value!r}"
            )


def _check_bias(encoder: TimeAwarePositionalEncoder | None, relative_bias: bool) -> None:
    """The relative form of Eq. 4 needs the bias that carries it.

    Raises:
        SlotError: there is none.
    """
    if encoder is not None and encoder.form == "relative" and not relative_bias:
        raise SlotError(
            "hpgr.TimeAwarePositionalEncoder.form = 'relative' needs "
            f"{_NAME}.relative_bias = True: the bias carries the positions"
        )


def _check_rival(
    encoder: type[RivalEncoder],
    attention_hook: AttentionHook | None,
    positional_encoder: TimeAwarePositionalEncoder | None,
) -> None:
    """A rival has no attention layers for a hook or a relative bias.

    Raises:
        SlotError: naming the slot that must be empty.
    """
    for slot, filled in (
        ("attention_hook", attention_hook is not None),
        ("positional_encoder", positional_encoder is not None),
    ):
        if filled:
            raise SlotError(
                f"{_NAME}.{slot} must be None where {_NAME}.encoder = @hpgr.{encoder.__name__}: "
                "it works on layers (hpgr.HSTURanker.layer)"
            )
