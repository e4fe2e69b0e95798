"""The session enhancement module, Eq. 1 and 2."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpgr_plugin.components.checks import check_at_least, check_choice, check_finite
from hpgr_plugin.components.sessions import Sessions, partition_sessions
from hpgr_plugin.components.transformer import INIT_STD, JaggedEncoder
from hpgr_plugin.errors import HpgrError
from hpgr_plugin.ops.jagged import (
    complete_cumsum,
    lead_with,
    ranges,
    segment_ids,
    segment_positions,
)
from hpgr_plugin.ops.segments import SegmentLayout, segment_layout, segment_mean
from hpgr_plugin.ops.session_pool import Spans, add_context, gather_spans, session_pool


class _EncodedSessions(NamedTuple):
    """The sessions, and the tokens of each, that SEM encodes.

    Attributes:
        spans: where the encoded tokens of S' sessions lie in the flat history.
        user_offsets: `[B + 1]` into these sessions.
    """

    spans: Spans
    user_offsets: Tensor


class OwnSessionPlan(NamedTuple):
    """Every session as a segment that begins with [CLS].

    Attributes:
        session: int64 `[T]`, the session of every token.
        place: int64 `[T]`, its row of the item positions.
        offsets: int64 `[S + 1]` of the sessions' tokens.
        rows: int64 `[T]`, the row of every token beside [CLS] tokens.
        layout: of the encoder.
    """

    session: Tensor
    place: Tensor
    offsets: Tensor
    rows: Tensor
    layout: SegmentLayout


class SessionTokens(NamedTuple):
    """Tokens that stand for the sessions before one, for candidates to attend to.

    Attributes:
        values: `[K, D]`, on the scale of item embeddings.
        before: int64 `[K]`, the history token that each one goes before: the first of a session.
            Whoever sees that token may see this one.
    """

    values: Tensor
    before: Tensor


class SessionPlan(NamedTuple):
    """The index arithmetic of SEM for B histories; on the host, it is planned without waiting.

    Attributes:
        session_offsets: int64 `[S + 1]`, the sessions' tokens.
        spans: the encoded tokens of the S' sessions that some token's summary needs.
        encoded_offsets: int64 `[B + 1]`, whose sessions these are.
        encoded_user: int64 `[S']`, the same by session.
        number: int64 `[S']`, the row of the session's position.
        layout: of the inter-session encoder.
        own: of the intra-session encoder over each session as far as a token, or None.
        read: int64 `[S]`, whose summary the tokens of a session get: a row of the inter-session
            encoder, where 0 is no session (causal), or a row or user (otherwise).
        later: int64 `[K]`, the sessions that get a token; None without session tokens.
    """

    session_offsets: Tensor
    spans: Spans
    encoded_offsets: Tensor
    encoded_user: Tensor
    number: Tensor
    layout: SegmentLayout
    own: OwnSessionPlan | None
    read: Tensor
    later: Tensor | None


class SessionContext(NamedTuple):
    """What SEM adds to the tokens of each session.

    Attributes:
        summary: `[S, D]`, F as the fusion takes it.
        session_offsets: int64 `[S + 1]` into the tokens; a session may have none here.
        own: `[T, D]`, the token's own session so far, as the fusion takes it, or None.
    """

    summary: Tensor
    session_offsets: Tensor
    own: Tensor | None = None

    def of_rows(self, rows: Tensor) -> SessionContext:
        """The same for some of the tokens only, `rows` `[P]`, ascending."""
        return self._replace(
            session_offsets=torch.searchsorted(rows, self.session_offsets),
            own=None if self.own is None else self.own.index_select(0, rows),
        )


class SessionEnhancementModule(nn.Module):
    """Adds a summary of the user's sessions to every history token.

    Eq. 1: `s_k = IntraTransformer([CLS], Emb(S_k))[CLS]`, one shared encoder on every session.
    Eq. 2: `F = InterTransformer(s_1..s_M)`, pooled, and `H_enhanced = fusion(H_emb, F)`.

    In causal form the summary for a token comes only from sessions that ended before its own
    session began, and tokens of the first session stay as they are. The sessions are then numbered
    from the user's first one, because a number counted from the end would tell how many sessions
    are still to come; numbers past `max_sessions` share the last position.

    Both limits keep the most recent. A session longer than `max_session_length` is encoded by its
    last `max_session_length` tokens. Of more than `max_sessions` sessions, the inter-session
    encoder reads the user's last `max_sessions`; in causal form a session attends to itself and
    the `max_sessions - 1` before it in each layer, because a cut counted from the user's last
    session would depend on the future. Tokens outside the limits receive the summary too.

    Args:
        embedding_dim: D, a multiple of `num_heads`.
        num_heads: attention heads of each of the two encoders.
        num_layers: layers of each of the two encoders.
        gap_seconds: the longest pause inside a session, seconds.
        pooling: "cls", a second [CLS] reads the sessions (in causal form it comes first, and the
            summary is the output at the last earlier session), or "mean" of the encoded sessions.
        fusion: "add", the paper's `H_emb + F`, or "gate", `h + gate * rms(h) * LayerNorm(F)`. The
            gate `[D]` starts at `gate_init`: at zero the module starts as the identity. `rms(h)`,
            the root mean square of the token (without gradient), keeps F on the scale of the item
            table, near 0.02 at the start, while the table grows.
        gate_init: where the gates of `fusion = "gate"` start; 0 with "add", which has none.
        own_session: also add, by the same fusion, what the intra-session encoder makes of the
            token's own session up to the token itself.
        session_tokens: also give each session but the first a token with the summary of the
            sessions before it (`tokens`), which candidates attend to as to an item. Causal form,
            and the embedded host's ranker, only.
        causal: whether a token's summary comes from earlier sessions only. None leaves the choice
            to the host, see `decide_causal`.
        max_session_length: most recent tokens of a session that are encoded.
        max_sessions: most recent sessions that are encoded.
        dropout: inside the encoders.

    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(
        self,
        *,
        embedding_dim: int,
        num_heads: int = 4,
        num_layers: int = 1,
        gap_seconds: int = 1800,
        pooling: Literal["cls", "mean"] = "cls",
        fusion: Literal["gate", "add"] = "gate",
        gate_init: float = 0.0,
        own_session: bool = False,
        session_tokens: bool = False,
        causal: bool | None = None,
        max_session_length: int = 512,
        max_sessions: int = 128,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_choice(("cls", "mean"), pooling=pooling)
        check_choice(("gate", "add"), fusion=fusion)
        check_at_least(1, max_session_length=max_session_length, max_sessions=max_sessions)
        check_at_least(0, gap_seconds=gap_seconds)
        check_finite(gate_init=gate_init)
        if fusion == "add" and gate_init != 0.0:
            raise HpgrError(f"gate_init must be 0 with fusion = 'add': no gate, got {gate_init}")
        if session_tokens and causal is False:
            raise HpgrError(
                "session_tokens needs causal = True or None: a token says what happened before"
            )
        self.own_session = own_session
        self.session_tokens = session_tokens
        self.embedding_dim = embedding_dim
        self.num_heads = num_heads
        self.num_layers = num_layers
        self.gap_seconds = gap_seconds
        self.pooling = pooling
        self.fusion = fusion
        self.causal = causal
        self.max_session_length = max_session_length
        self.max_sessions = max_sessions

        def encoder() -> JaggedEncoder:
            return JaggedEncoder(
                embedding_dim=embedding_dim,
                num_heads=num_heads,
                num_layers=num_layers,
                dropout=dropout,
            )

        def learned(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape).normal_(std=INIT_STD))

        self.intra_encoder = encoder()
        self.inter_encoder = encoder()
        self.session_cls = learned(embedding_dim)
        self.item_position = learned(max_session_length, embedding_dim)
        self.session_position = learned(max_sessions, embedding_dim)
        if pooling == "cls":
            self.history_cls = learned(embedding_dim)
        if fusion == "gate":
            self.gate = nn.Parameter(torch.full((embedding_dim,), float(gate_init)))
            if own_session:
                self.own_gate = nn.Parameter(torch.full((embedding_dim,), float(gate_init)))
        if session_tokens:
            self.token_vector = learned(embedding_dim)
            self.token_scale = nn.Parameter(torch.full((embedding_dim,), INIT_STD))

    def decide_causal(self, required: bool, reason: str) -> None:
        """The host's choice of the form, where the constructor left it open.

        The causal form is required wherever a token may be read by a prediction for an earlier
        time: candidates (or predicted tokens) of different times share a history, or a history may
        reach past its candidate's time. Elsewhere the other form sees more. An explicit
        `causal=True` always stands.

        Args:
            required: whether the host reads histories in such a way.
            reason: which setting of the host makes it so, for the message.

        Raises:
            HpgrError: `causal=False` where the causal form is required.
        """
        if self.causal is None:
            self.causal = required or self.session_tokens
        elif required and not self.causal:
            raise HpgrError(
                f"hpgr.SessionEnhancementModule.causal must be True or None here, got False: "
                f"{reason}, so SEM would show predictions their own future"
            )

    def forward(
        self,
        embeddings: Tensor,
        offsets: Tensor,
        timestamps: Tensor,
        *,
        plan: SessionPlan | None = None,
    ) -> Tensor:
        """Enhance the tokens of B histories.

        Args:
            embeddings: `[T, D]`, tokens in order of time inside every user.
            offsets: `[B + 1]`; a user may have no tokens.
            timestamps: int64 `[T]`, seconds.
            plan: of the same histories, see `plan`; None makes it here.

        Returns:
            H_enhanced `[T, D]`, in the dtype of `embeddings`.

        Raises:
            ValueError: from `partition_sessions`, embeddings that are not `[T, D]`, or `causal`
                still undecided.
        """
        return self.fuse(embeddings, self.context(embeddings, offsets, timestamps, plan=plan))

    def context(
        self,
        embeddings: Tensor,
        offsets: Tensor,
        timestamps: Tensor,
        *,
        plan: SessionPlan | None = None,
    ) -> SessionContext:
        """What `fuse` adds to the tokens of B histories; arguments as in `forward`."""
        if embeddings.shape != (timestamps.numel(), self.embedding_dim):
            raise ValueError(
                f"embeddings must be [{timestamps.numel()}, {self.embedding_dim}], one row per "
                f"timestamp, got {list(embeddings.shape)}"
            )
        if plan is None:
            plan = self.plan(offsets, timestamps)
        history = embeddings.to(self.session_cls.dtype)
        vectors = self._encode_sessions(history, plan.spans)
        summary = self._summarise(vectors, plan)
        own = None if plan.own is None else self._encode_own_sessions(history, plan.own)
        if self.fusion == "gate":
            summary = F.layer_norm(summary, summary.shape[1:])
            own = None if own is None else F.layer_norm(own, own.shape[1:])
        return SessionContext(summary, plan.session_offsets, own)

    @torch.no_grad()
    def plan(
        self, offsets: Tensor, timestamps: Tensor, *, device_type: str | None = None
    ) -> SessionPlan:
        """The index arithmetic of `forward`, on the device of its arguments.

        Args:
            offsets: `[B + 1]`.
            timestamps: int64 `[T]`, seconds.
            device_type: see `segment_layout`.

        Raises:
            ValueError: as in `forward`.
        """
        if self.causal is None:
            raise ValueError(
                "causal is undecided: pass causal=True or False, or let the host call decide_causal"
            )
        sessions = partition_sessions(timestamps, offsets, self.gap_seconds)
        encoded = self._choose(sessions)
        count = encoded.spans.starts.numel()
        user = segment_ids(encoded.user_offsets, count)
        place = torch.arange(count, device=offsets.device)
        if self.causal:
            number = (place - encoded.user_offsets[user]).clamp(max=self.max_sessions - 1)
        else:
            number = encoded.user_offsets[user + 1] - 1 - place
        leads = int(self.pooling == "cls")
        rows = encoded.user_offsets
        if leads:
            rows = rows + torch.arange(len(rows), device=rows.device)
        layout = segment_layout(
            rows,
            causal=bool(self.causal),
            window=self.max_sessions if self.causal else None,
            sink=bool(self.causal) and leads == 1,
            device_type=device_type,
        )
        return SessionPlan(
            session_offsets=sessions.session_offsets,
            spans=encoded.spans,
            encoded_offsets=encoded.user_offsets,
            encoded_user=user,
            number=number,
            layout=layout,
            own=self._plan_own(sessions, device_type) if self.own_session else None,
            read=self._read_rows(sessions, rows, leads),
            later=_later(sessions.session_offsets, offsets) if self.session_tokens else None,
        )

    def fuse(self, embeddings: Tensor, context: SessionContext) -> Tensor:
        """H_enhanced of tokens `[P, D]`, all of the histories or those `context.of_rows` is for."""
        history = embeddings.to(self.session_cls.dtype)
        summary, offsets, own = context
        if self.fusion == "gate":
            enhanced = add_context(history, summary, self.gate, offsets)
        else:
            enhanced = history + F.embedding(segment_ids(offsets, len(history)), summary)
        if own is not None and self.fusion == "gate":
            rms = history.detach().square().mean(1, keepdim=True).sqrt()
            enhanced = enhanced + self.own_gate * rms * own
        elif own is not None:
            enhanced = enhanced + own
        return enhanced.to(embeddings.dtype)

    def tokens(
        self, context: SessionContext, offsets: Tensor, *, plan: SessionPlan | None = None
    ) -> SessionTokens:
        """A token for each session but a user's first, with what came before that session.

        Args:
            context: of the whole histories.
            offsets: `[B + 1]`, of the same histories.
            plan: of the same histories, made by this module.
        """
        later = None if plan is None else plan.later
        if later is None:
            later = _later(context.session_offsets, offsets)
        summary = F.layer_norm(context.summary[later], context.summary.shape[1:])
        values = self.token_vector + self.token_scale * summary
        return SessionTokens(values, context.session_offsets[later])

    def refuse_tokens(self, host: str) -> None:
        """For hosts that have no session tokens.

        Raises:
            HpgrError: they are asked for.
        """
        if self.session_tokens:
            raise HpgrError(
                f"hpgr.SessionEnhancementModule.session_tokens must be False for {host}: "
                "only the layers of hpgr.HSTURanker take session tokens"
            )

    def _choose(self, sessions: Sessions) -> _EncodedSessions:
        """The sessions that some token's summary needs, and their most recent tokens."""
        available = sessions.user_offsets.diff()
        if self.causal:  # no token comes after a user's last session
            counts, starts = (available - 1).clamp(min=0), sessions.user_offsets[:-1]
        else:
            counts = available.clamp(max=self.max_sessions)
            starts = sessions.user_offsets[1:] - counts
        chosen = ranges(starts, counts)
        lengths = sessions.session_offsets.diff()[chosen].clamp(max=self.max_session_length)
        spans = Spans(sessions.session_offsets[1:][chosen] - lengths, lengths)
        return _EncodedSessions(spans, complete_cumsum(counts))

    def _encode_sessions(self, history: Tensor, spans: Spans) -> Tensor:
        """Eq. 1: tokens `[T, D]` -> one vector per session `[S', D]`."""
        inputs = history, self.item_position, self.session_cls
        if self.num_layers > 1:
            x, offsets = gather_spans(*inputs, spans)
            return self.intra_encoder.first_tokens(x, segment_layout(offsets))
        layer = self.intra_encoder.first_layer
        weights = layer.head_weights()
        pooled = session_pool(*inputs, weights.pool, spans)
        x = self.intra_encoder.final_norm(layer.finish_pooled(pooled.lead, pooled.means, weights))
        return x if pooled.place is None else x.index_select(0, pooled.place)

    def _plan_own(self, sessions: Sessions, device_type: str | None) -> OwnSessionPlan:
        session, offsets = sessions.session_index, sessions.session_offsets
        rows = torch.arange(len(session), device=session.device)
        place = (rows - offsets[session]).clamp(max=self.max_session_length - 1)
        layout = segment_layout(
            offsets + torch.arange(len(offsets), device=offsets.device),
            causal=True,
            window=self.max_session_length,
            sink=True,
            device_type=device_type,
        )
        return OwnSessionPlan(session, place, offsets, rows + session + 1, layout)

    def _encode_own_sessions(self, history: Tensor, plan: OwnSessionPlan) -> Tensor:
        """Tokens `[T, D]` -> each one's session as far as the token, `[T, D]`."""
        x = history + F.embedding(plan.place, self.item_position)
        x, _ = lead_with(self.session_cls, x, plan.offsets, plan.session)
        encoded: Tensor = self.intra_encoder(x, plan.layout, plan.rows)
        return encoded

    def _read_rows(self, sessions: Sessions, rows: Tensor, leads: int) -> Tensor:
        """`SessionPlan.read`; rows: `[B + 1]` of the inter-session encoder."""
        count = sessions.session_offsets.numel() - 1
        user = segment_ids(sessions.user_offsets, count)
        if not self.causal:
            return user if leads else rows[user]
        earlier = segment_positions(sessions.user_offsets, count)
        return torch.where(earlier > 0, rows[user] + leads + earlier, 0)

    def _summarise(self, vectors: Tensor, plan: SessionPlan) -> Tensor:
        """Eq. 2: vectors of the encoded sessions `[S', D]` -> F for the tokens of each `[S, D]`."""
        x = vectors + F.embedding(plan.number, self.session_position)
        if self.pooling == "cls":
            x, _ = lead_with(self.history_cls, x, plan.encoded_offsets, plan.encoded_user)
        # F.embedding instead of indexing: its backward adds up in a fixed order on CUDA too.
        if self.causal:
            x = self._pool_all(x, plan.layout)
            return F.embedding(plan.read, torch.cat([x.new_zeros(1, x.shape[1]), x]))
        if self.pooling == "cls":
            return F.embedding(plan.read, self.inter_encoder.first_tokens(x, plan.layout))
        return F.embedding(plan.read, self._pool_all(x, plan.layout))

    def _pool_all(self, x: Tensor, layout: SegmentLayout) -> Tensor:
        """The pooled summary of the rows that each row sees, `[R, D]` -> `[R, D]`."""
        x = self.inter_encoder(x, layout)
        return segment_mean(x, layout) if self.pooling == "mean" else x


def _later(session_offsets: Tensor, offsets: Tensor) -> Tensor:
    """The sessions `[S + 1]` that are not the first of a history `[B + 1]`, int64 `[K]`."""
    return (~torch.isin(session_offsets[:-1], offsets)).nonzero().squeeze(1)
