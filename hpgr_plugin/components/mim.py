"""Masked item modelling, Eq. 3: the pre-training of stage 1."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpgr_plugin.components.checks import check_at_least, check_choice, check_finite
from hpgr_plugin.components.item_features import ItemFeatures, gated
from hpgr_plugin.components.sem import SessionEnhancementModule, SessionPlan
from hpgr_plugin.components.sessions import Sessions, partition_sessions
from hpgr_plugin.components.sharded_table import RowShardedTable, Tables, build_sharded_table
from hpgr_plugin.components.transformer import INIT_STD, JaggedEncoder, embedding
from hpgr_plugin.errors import HpgrError
from hpgr_plugin.ops.item_softmax import (
    MeanLoss,
    mean_cross_entropy,
    sampled_cross_entropy,
    sampled_cross_entropy_of_rows,
    sharded_cross_entropy,
    total_weight,
)
from hpgr_plugin.ops.jagged import segment_ids, segment_positions
from hpgr_plugin.ops.segments import SegmentLayout, segment_layout

Masking = Literal["item", "session", "mixed"]


class MaskedItemOutput(NamedTuple):
    """The result of masked item modelling on one batch.

    Attributes:
        loss: scalar, mean over the masked items, weighted by their actions where that is bound;
            zero when there are none. Where a sharded table has a softmax over all items, over the
            masked items of all processes.
        num_masked: the number of masked items.
        accuracy: scalar without gradient, the share of masked items that score highest (among the
            sampled items, where the softmax is sampled).
    """

    loss: Tensor
    num_masked: int
    accuracy: Tensor


class Corruption(NamedTuple):
    """Histories with some items masked.

    Attributes:
        items: int64 `[T]`, some of the masked items replaced by random ones.
        masked: bool `[T]`, the items to predict.
        hidden: bool `[T]`, the masked items that the mask vector replaces.
    """

    items: Tensor
    masked: Tensor
    hidden: Tensor


class HistoryIndex(NamedTuple):
    """The index arithmetic of encoding B histories.

    Attributes:
        from_end: int64 `[T]`, the place of every item counted from the end of its history.
        layout: of the encoder.
        sessions: of SEM, or None without one.
    """

    from_end: Tensor
    layout: SegmentLayout
    sessions: SessionPlan | None


class MaskPlan(NamedTuple):
    """All that a step needs beside embeddings: what is masked, drawn, and read where.

    Attributes:
        corruption: of the histories.
        places: int64 `[M]`, the items to predict.
        histories: of the same histories.
        draws: float64, uniform, one for each negative of a sampled softmax; None without one.
    """

    corruption: Corruption
    places: Tensor
    histories: HistoryIndex
    draws: Tensor | None


def choose_masked(
    offsets: Tensor,
    sessions: Sessions,
    *,
    mask_ratio: float,
    masking: Masking,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Choose the items to predict, bool `[T]`.

    A user of n items has a budget of `mask_ratio * n` items, rounded up or down at random, at
    least 1 and at most n - 1. Nothing is masked for a user with a single item.

    Args:
        offsets: `[B + 1]`.
        sessions: of the same histories.
        mask_ratio: share of the items, in (0, 1).
        masking: "item" masks as many independent items as the budget. "session" masks whole
            sessions in random order, up to the count that is nearest the budget; where the first
            one has more than twice the budget, it masks the budget inside that session. "mixed"
            draws one of the two for each user.
        generator: on any device.
    """
    total = sessions.session_index.numel()
    offsets = offsets.long()
    device = offsets.device
    lengths = offsets.diff()
    user = segment_ids(offsets, total)
    session_user = segment_ids(sessions.user_offsets, sessions.session_offsets.numel() - 1)
    budget = (mask_ratio * lengths + _rand(lengths.numel(), device, generator)).long()
    budget = torch.minimum(budget.clamp(min=1), (lengths - 1).clamp(min=0))
    by_session = torch.full_like(budget, masking == "session", dtype=torch.bool)
    if masking == "mixed":
        by_session = _rand(lengths.numel(), device, generator) < 0.5

    # Sessions in random order inside each user, and the user's tokens that come before each.
    drawn = (session_user + _rand(session_user.numel(), device, generator)).argsort()
    size = sessions.session_offsets.diff()[drawn]
    drawn_user = session_user[drawn]
    before = size.cumsum(0) - size - offsets[drawn_user]
    whole = (before + size / 2 <= budget[drawn_user]) & (before + size < lengths[drawn_user])
    whole &= by_session[drawn_user]
    masked = torch.empty_like(whole).index_copy(0, drawn, whole)[sessions.session_index]
    drawn_first = torch.empty_like(whole).index_copy(0, drawn, before == 0)[sessions.session_index]

    # Users without a whole session: items in random order, those of the session drawn first ahead.
    has_whole = torch.zeros_like(by_session)
    has_whole[drawn_user[whole]] = True
    later = by_session[user] & ~drawn_first
    tokens = (2 * user + later + _rand(total, device, generator)).argsort()
    rank = torch.arange(total, device=device) - offsets[user]
    single = (rank < budget[user]) & ~has_whole[user]  # sorted inside each user: `user` stays
    return masked | torch.empty_like(single).index_copy(0, tokens, single)


class MaskedItemModel(nn.Module):
    """A bidirectional encoder that predicts masked items, with a softmax tied to the item table.

    Eq. 3: `L = - sum_{i masked} log P(h_i | unmasked)`, here as a mean. Stage 2 inherits
    `item_table`, `sem` and `item_features`.

    Args:
        num_items: V, 2 or more.
        embedding_dim: D, a multiple of `num_heads`.
        num_heads: attention heads of the encoder.
        num_layers: layers of the encoder.
        dropout: inside the encoder.
        max_sequence_length: the longest history, in items.
        sem: a session enhancement module of the same `embedding_dim`, or None.
        mask_before_sem: True masks the input of SEM. False is the order of the paper's figure, in
            which SEM sees the items to predict, so its context gives them away.
        mask_ratio: see `choose_masked`.
        masking: see `choose_masked`.
        mask_vector_share: share of the masked items that a learned mask vector replaces.
        random_item_share: share of the masked items that a random item replaces; the rest stay.
        gap_seconds: the longest pause inside a session, seconds, for masking; None takes that of
            `sem`, or 1800 without one.
        output_bias: whether the softmax has a learned bias for each item.
        full_softmax_max_items: up to this number of items the softmax is over all items; beyond,
            it is sampled with log-Q correction.
        num_sampled: negatives of a sampled softmax, shared by the batch.
        condition_on_action: also give the encoder what the user did with every item, masked ones
            too, so that an item is predicted knowing whether it was liked.
        action_weights: of a masked item in the loss, by the code of its action; None: all alike.
        num_actions: codes of actions, for the two above.
        feature_gate_tau: above 0, an item of n training events is `g row + (1 - g) features` with
            `g = n / (n + feature_gate_tau)`, as input and in the softmax: its features speak for it
            until its own row has been trained (`hpgr.RareItems.gate_tau` of stage 2).
        item_feature_codes: item feature name -> `[V]` codes, for the gate.
        item_events: int64 `[V]`, the training events of every item, for the gate.
        item_counts: `[V]`, how often each item occurs; negatives are drawn in proportion to
            count + 1, or uniformly when None.
        tables: "dense" holds the whole item table in every process. "torchrec" divides its rows
            among the processes by torchrec, "rows" without it: both for tables that no single GPU
            holds. All processes then call `forward` at the same time; `output_bias`,
            `action_weights` and `feature_gate_tau` take "dense".

    Raises:
        ValueError: an argument out of its range, a SEM of another size, or an option that takes
            a dense table.
    """

    log_proposal: Tensor | None
    cumulative_proposal: Tensor | None

    def __init__(
        self,
        *,
        num_items: int,
        embedding_dim: int,
        num_heads: int = 4,
        num_layers: int = 2,
        dropout: float = 0.0,
        max_sequence_length: int = 512,
        sem: SessionEnhancementModule | None = None,
        mask_before_sem: bool = True,
        mask_ratio: float = 0.2,
        masking: Masking = "mixed",
        mask_vector_share: float = 0.8,
        random_item_share: float = 0.1,
        gap_seconds: int | None = None,
        output_bias: bool = False,
        full_softmax_max_items: int = 200_000,
        num_sampled: int = 8192,
        condition_on_action: bool = False,
        action_weights: Sequence[float] | None = None,
        num_actions: int | None = None,
        feature_gate_tau: float = 0.0,
        item_feature_codes: Mapping[str, Tensor] | None = None,
        item_events: Tensor | None = None,
        item_counts: Tensor | None = None,
        tables: Tables = "dense",
    ) -> None:
        super().__init__()
        check_at_least(2, num_items=num_items)
        check_at_least(
            1,
            embedding_dim=embedding_dim,
            max_sequence_length=max_sequence_length,
            num_sampled=num_sampled,
        )
        check_at_least(0, full_softmax_max_items=full_softmax_max_items)
        check_at_least(0, feature_gate_tau=feature_gate_tau)
        check_finite(feature_gate_tau=feature_gate_tau)
        if gap_seconds is not None:
            check_at_least(0, gap_seconds=gap_seconds)
        check_choice(get_args(Masking), masking=masking)
        check_choice(get_args(Tables), tables=tables)
        _check_tables(
            tables,
            output_bias=output_bias,
            action_weights=action_weights,
            feature_gate_tau=feature_gate_tau,
        )
        if not 0.0 < mask_ratio < 1.0:
            raise HpgrError(f"mask_ratio must be between 0 and 1, got {mask_ratio}")
        shares = (mask_vector_share, random_item_share)
        if min(shares) < 0.0 or sum(shares) > 1.0 + 1e-9:
            raise HpgrError(
                "mask_vector_share and random_item_share must be 0 or more and at most 1 "
                f"together, got {mask_vector_share} and {random_item_share}"
            )
        if sem is not None and sem.embedding_dim != embedding_dim:
            raise HpgrError(f"sem must have embedding_dim {embedding_dim}, got {sem.embedding_dim}")
        if item_counts is not None and item_counts.shape != (num_items,):
            raise ValueError(f"item_counts must be [{num_items}], got {list(item_counts.shape)}")
        self.reads_actions = condition_on_action or action_weights is not None
        if self.reads_actions:
            _check_actions(num_actions, action_weights)
        self.num_items = num_items
        self.max_sequence_length = max_sequence_length
        self.mask_before_sem = mask_before_sem
        self.mask_ratio = mask_ratio
        self.masking: Masking = masking
        self.mask_vector_share = mask_vector_share
        self.random_item_share = random_item_share
        sem_gap = 1800 if sem is None else sem.gap_seconds
        self.gap_seconds = sem_gap if gap_seconds is None else gap_seconds
        self.num_sampled = num_sampled if num_items > full_softmax_max_items else None

        self.item_table: nn.Embedding | RowShardedTable
        if tables == "dense":
            self.item_table = embedding(num_items, embedding_dim)
        else:
            self.item_table = build_sharded_table(
                tables, num_embeddings=num_items, embedding_dim=embedding_dim, std=INIT_STD
            )
        self.mask_vector = nn.Parameter(torch.empty(embedding_dim))
        self.position = nn.Parameter(torch.empty(max_sequence_length, embedding_dim))
        for weight in (self.mask_vector, self.position):
            nn.init.normal_(weight, std=INIT_STD)
        self.sem = sem
        self.encoder = JaggedEncoder(
            embedding_dim=embedding_dim,
            num_heads=num_heads,
            num_layers=num_layers,
            dropout=dropout,
            final_norm=True,
        )
        self.output_bias = nn.Parameter(torch.zeros(num_items)) if output_bias else None
        self.feature_gate_tau = feature_gate_tau
        self.item_features: ItemFeatures | None = None
        if feature_gate_tau > 0:
            codes, events = _check_gate(num_items, item_feature_codes, item_events)
            self.item_features = ItemFeatures(codes, embedding_dim)
            self.item_events: Tensor
            self.register_buffer("item_events", events.long(), persistent=False)
        self.action_table = None
        if condition_on_action:
            self.action_table = embedding(num_actions or 0, embedding_dim)
        self.action_weights: Tensor | None
        weights = None if action_weights is None else torch.tensor(list(action_weights)).float()
        self.register_buffer("action_weights", weights, persistent=False)
        log_proposal = cumulative_proposal = None
        # A sharded table draws uniformly without V numbers in every process.
        if self.num_sampled is not None and (tables == "dense" or item_counts is not None):
            counts = torch.zeros(num_items) if item_counts is None else item_counts
            proposal = (counts.double() + 1.0) / (counts.double() + 1.0).sum()
            log_proposal, cumulative_proposal = proposal.log(), proposal.cumsum(0)
        self.register_buffer("log_proposal", log_proposal, persistent=False)
        self.register_buffer("cumulative_proposal", cumulative_proposal, persistent=False)

    def forward(
        self,
        items: Tensor,
        offsets: Tensor,
        timestamps: Tensor,
        *,
        actions: Tensor | None = None,
        generator: torch.Generator | None = None,
        plan: MaskPlan | None = None,
    ) -> MaskedItemOutput:
        """Mask, encode and score B histories.

        Args:
            items: int64 `[T]`, in `[0, V)`, in order of time inside every user.
            offsets: `[B + 1]`; a user may have no items.
            timestamps: int64 `[T]`, seconds.
            actions: int64 `[T]`, codes, for `condition_on_action` and `action_weights`.
            generator: draws masks, random items and negatives, all but dropout.
            plan: of these histories, see `plan`, in place of the generator; None makes it here.

        Raises:
            ValueError: a history longer than `max_sequence_length`, no actions where they are read,
                or from `partition_sessions`.
        """
        if self.reads_actions and actions is None:
            raise ValueError("condition_on_action and action_weights need actions, got None")
        if plan is None:
            plan = self.plan(items, offsets, timestamps, generator=generator)
        places = plan.places
        table = self._table()
        encoded = self.encode(
            items,
            plan.corruption,
            offsets,
            timestamps,
            index=plan.histories,
            table=table,
            read=places,
            actions=actions,
        )
        weights = None
        if self.action_weights is not None and actions is not None:
            weights = self.action_weights[actions[places]]
        scored = self._score(encoded, table, items[places], plan.draws, weights)
        return MaskedItemOutput(
            loss=scored.loss,
            num_masked=places.numel(),
            accuracy=scored.hits / max(1, places.numel()),
        )

    @torch.no_grad()
    def plan(
        self,
        items: Tensor,
        offsets: Tensor,
        timestamps: Tensor,
        *,
        generator: torch.Generator | None = None,
        device_type: str | None = None,
    ) -> MaskPlan:
        """What `forward` masks and draws, and its index arithmetic; reads no weights.

        Its sizes depend on the data. Planned for tensors on the host, and moved together with them,
        a step on a CUDA device has nothing to wait for.

        Args:
            items, offsets, timestamps, generator: as in `forward`.
            device_type: "cuda" or "cpu", where the step will run; None: where the offsets are.

        Raises:
            ValueError: as in `forward`.
        """
        corruption = self.corrupt(items, offsets, timestamps, generator=generator)
        draws = None
        if self.num_sampled is not None:
            draws = _rand(self.num_sampled, items.device, generator)
        return MaskPlan(
            corruption=corruption,
            places=corruption.masked.nonzero().squeeze(1),
            histories=self._index(offsets, timestamps, device_type),
            draws=draws,
        )

    def _index(
        self, offsets: Tensor, timestamps: Tensor, device_type: str | None = None
    ) -> HistoryIndex:
        lengths = offsets.diff()
        if (lengths > self.max_sequence_length).any():
            row = int(lengths.argmax())
            raise HpgrError(
                f"a history must have at most max_sequence_length = {self.max_sequence_length} "
                f"items, user row {row} has {int(lengths[row])}"
            )
        total = timestamps.numel()
        from_end = lengths[segment_ids(offsets, total)] - 1 - segment_positions(offsets, total)
        sessions = None
        if self.sem is not None:
            sessions = self.sem.plan(offsets, timestamps, device_type=device_type)
        return HistoryIndex(from_end, segment_layout(offsets, device_type=device_type), sessions)

    @torch.no_grad()
    def corrupt(
        self,
        items: Tensor,
        offsets: Tensor,
        timestamps: Tensor,
        *,
        generator: torch.Generator | None = None,
    ) -> Corruption:
        """Choose the items to predict and what replaces them; arguments as in `forward`."""
        masked = choose_masked(
            offsets,
            partition_sessions(timestamps, offsets, self.gap_seconds),
            mask_ratio=self.mask_ratio,
            masking=self.masking,
            generator=generator,
        )
        draw = _rand(items.numel(), items.device, generator)
        hidden = masked & (draw < self.mask_vector_share)
        replaced = masked & ~hidden & (draw < self.mask_vector_share + self.random_item_share)
        random_items = (_rand(items.numel(), items.device, generator) * self.num_items).long()
        return Corruption(torch.where(replaced, random_items, items), masked, hidden)

    def encode(
        self,
        items: Tensor,
        corruption: Corruption,
        offsets: Tensor,
        timestamps: Tensor,
        *,
        index: HistoryIndex | None = None,
        table: Tensor | RowShardedTable | None = None,
        read: Tensor | None = None,
        actions: Tensor | None = None,
    ) -> Tensor:
        """Encode corrupted histories.

        Args:
            items: int64 `[T]`, the original items.
            corruption: of these items.
            offsets: `[B + 1]`.
            timestamps: int64 `[T]`, seconds.
            index: of these histories, as in a `MaskPlan`; None makes it here.
            table: of the items, where the caller has made it; None makes it here.
            read: int64 `[R]`, the tokens whose output is needed; None is all.
            actions: as in `forward`.

        Returns:
            `[T, D]`, or `[R, D]` for the tokens `read`.

        Raises:
            ValueError: as in `forward`.
        """
        index = self._index(offsets, timestamps) if index is None else index
        table = self._table() if table is None else table
        hidden = corruption.hidden.unsqueeze(1)
        if self.mask_before_sem:
            x = torch.where(hidden, self.mask_vector, _look_up(table, corruption.items))
        else:
            x = _look_up(table, items)
        if self.sem is not None:
            x = self.sem(x, offsets, timestamps, plan=index.sessions)
        if not self.mask_before_sem:
            replaced = (corruption.items != items).unsqueeze(1)
            x = torch.where(replaced, _look_up(table, corruption.items), x)
            x = torch.where(hidden, self.mask_vector, x)
        x = x + F.embedding(index.from_end, self.position)
        if self.action_table is not None and actions is not None:
            x = x + self.action_table(actions)
        encoded: Tensor = self.encoder(x, index.layout, read)
        return encoded

    def _table(self) -> Tensor | RowShardedTable:
        """What embeds and scores the items, `[V, D]` or this process's part of it."""
        if isinstance(self.item_table, RowShardedTable):
            return self.item_table
        rows = self.item_table.weight
        if self.item_features is None:
            return rows
        features = self.item_features(torch.arange(self.num_items, device=rows.device))
        return gated(rows, features, self.item_events, self.feature_gate_tau)

    def _score(
        self,
        hidden: Tensor,
        table: Tensor | RowShardedTable,
        targets: Tensor,
        draws: Tensor | None,
        weights: Tensor | None,
    ) -> MeanLoss:
        if isinstance(table, RowShardedTable):
            return self._score_shards(hidden, table, targets, draws)
        bias = self.output_bias
        if draws is None:
            return mean_cross_entropy(hidden, table, targets, bias, weights)
        assert self.log_proposal is not None  # of a dense table, however negatives are drawn
        negatives = self._negatives(draws)
        scored = sampled_cross_entropy(hidden, table, targets, negatives, self.log_proposal, bias)
        losses = scored.losses if weights is None else scored.losses * weights
        return MeanLoss(losses.sum() / total_weight(len(targets), weights), scored.hits.sum())

    def _score_shards(
        self, hidden: Tensor, table: RowShardedTable, targets: Tensor, draws: Tensor | None
    ) -> MeanLoss:
        if draws is None:
            return sharded_cross_entropy(
                hidden,
                table.weight,
                targets,
                first_row=table.first_row,
                num_items=self.num_items,
            )
        negatives = self._negatives(draws)
        if self.log_proposal is None:
            log_proposal = torch.full_like(draws, -math.log(self.num_items))
        else:
            log_proposal = self.log_proposal[negatives]
        # One look-up, so that the processes exchange rows once.
        rows = table(torch.cat([targets, negatives]))
        target_rows, negative_rows = rows[: len(targets)], rows[len(targets) :]
        scored = sampled_cross_entropy_of_rows(
            hidden, target_rows, negative_rows, targets, negatives, log_proposal
        )
        return MeanLoss(scored.losses.sum() / total_weight(len(targets), None), scored.hits.sum())

    def _negatives(self, draws: Tensor) -> Tensor:
        """Items `[K]` from uniform draws `[K]`; without a proposal, all are as likely."""
        if self.cumulative_proposal is None:
            return (draws * self.num_items).long()
        negatives = torch.searchsorted(self.cumulative_proposal, draws)
        return negatives.clamp(max=self.num_items - 1)


def _look_up(table: Tensor | RowShardedTable, items: Tensor) -> Tensor:
    """Rows of a table that is here as a whole, or in shards, `[N, D]`."""
    if isinstance(table, Tensor):
        return F.embedding(items, table)
    rows: Tensor = table(items)
    return rows


def _check_tables(tables: Tables, **options: object) -> None:
    """Raises `HpgrError` for a sharded table with an option, by its name, that is not off."""
    if tables == "dense":
        return
    for name, value in options.items():
        if value:
            raise HpgrError(
                f"hpgr.MaskedItemModel.{name} = {value} takes "
                f"hpgr.MaskedItemModel.tables = 'dense', got {tables!r}"
            )


def _check_gate(
    num_items: int, codes: Mapping[str, Tensor] | None, events: Tensor | None
) -> tuple[Mapping[str, Tensor], Tensor]:
    """Raises `HpgrError` for a log without item features, or counts of another size."""
    if not codes or events is None:
        raise HpgrError("feature_gate_tau must be 0 for a log without item features")
    if events.shape != (num_items,):
        raise HpgrError(f"item_events must be [{num_items}], got {list(events.shape)}")
    return codes, events


def _check_actions(num_actions: int | None, weights: Sequence[float] | None) -> None:
    """Raises `HpgrError` for weights that do not fit the actions, or no actions."""
    if num_actions is None:
        raise HpgrError(
            "condition_on_action and action_weights need num_actions: this host's stage 1 has none"
        )
    check_at_least(1, num_actions=num_actions)
    if weights is None:
        return
    if len(weights) != num_actions or not all(0.0 <= w < math.inf for w in weights):
        raise HpgrError(
            f"action_weights must be {num_actions} numbers of 0 or more, one for each action, "
            f"got {list(weights)}"
        )
    if not any(weights):
        raise HpgrError("action_weights must not all be 0")


def _rand(size: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
    """Uniform float64 `[size]`, drawn on the generator's device."""
    where = device if generator is None else generator.device
    return torch.rand(size, dtype=torch.float64, device=where, generator=generator).to(device)
