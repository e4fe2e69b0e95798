"""The session enhancement module, Eq. 1 and 2."""

from __future__ import annotations

from typing import Literal, NamedTuple

import gin
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpgr_plugin.components.sessions import Sessions, partition_sessions
from hpgr_plugin.components.transformer import (
    INIT_STD,
    JaggedEncoder,
    SegmentLayout,
    segment_layout,
    segment_mean,
)
from hpgr_plugin.ops.jagged import (
    complete_cumsum,
    lead_with,
    ranges,
    segment_ids,
    segment_positions,
)
from hpgr_plugin.ops.session_pool import PoolWeights, Spans, add_context, gather_spans, session_pool


class _EncodedSessions(NamedTuple):
    """Which sessions, and which of their tokens, SEM encodes.

    token_starts, token_lengths: `[S']` the tokens of each session, in the flat history.
    user_offsets: `[B + 1]` into these sessions.
    """

    token_starts: Tensor
    token_lengths: Tensor
    user_offsets: Tensor


@gin.configurable(module="hpgr")
class SessionEnhancementModule(nn.Module):
    """Adds what a user's sessions say together to every history token.

    Eq. 1: `s_k = IntraTransformer([CLS], Emb(S_k))[CLS]`, one shared encoder, each session alone.
    Eq. 2: `F = InterTransformer(s_1..s_M)`, pooled, and `H_enhanced = fusion(H_emb, F)`.

    In causal form the context of a token comes only from sessions that ended before its own
    session began, and a token of the first session is left as it is. The sessions are then
    numbered from the user's first one, because a number counted from the end would tell how many
    sessions are still to come; numbers past `max_sessions` share the last position.

    Caps keep the most recent. A session longer than `max_session_length` is summarised by its last
    `max_session_length` tokens. With more than `max_sessions` sessions, the inter-session encoder
    reads the last `max_sessions` of the user; in causal form each of its layers lets a session
    look at itself and the `max_sessions - 1` before it (a cut counted from the user's end would
    depend on the future). Tokens outside the caps receive the context all the same.

    Args:
        embedding_dim: D, a multiple of `num_heads`.
        num_heads, num_layers: of each of the two encoders.
        gap_seconds: the longest pause inside a session, seconds.
        pooling: "cls", a second [CLS] reads the sessions (in causal form it leads them, and the
            context is the output at the last earlier session), or "mean" of the encoded sessions.
        fusion: "add", the paper's `H_emb + F`, or "gate": `h + gate * rms(h) * LayerNorm(F)` with
            `gate` `[D]` starting at zero, so the module starts as the identity. The item table
            lives on a scale near 0.02: rms(h), the token's own root mean square, keeps F on that
            scale as the table grows, and the gate says its share. No gradient through rms(h).
        causal: for next-item objectives.
        max_session_length: tokens.
        max_sessions: sessions.
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
        causal: bool = False,
        max_session_length: int = 512,
        max_sessions: int = 128,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if pooling not in ("cls", "mean"):
            raise ValueError(f'pooling must be "cls" or "mean", got {pooling!r}')
        if fusion not in ("gate", "add"):
            raise ValueError(f'fusion must be "gate" or "add", got {fusion!r}')
        for name, value in (
            ("max_session_length", max_session_length),
            ("max_sessions", max_sessions),
        ):
            if value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")
        if gap_seconds < 0:
            raise ValueError(f"gap_seconds must be 0 or more seconds, got {gap_seconds}")
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
            self.gate = nn.Parameter(torch.zeros(embedding_dim))

    def forward(self, embeddings: Tensor, offsets: Tensor, timestamps: Tensor) -> Tensor:
        """Enhance the tokens of B histories.

        Args:
            embeddings: `[T, D]`, tokens in order of time inside every user.
            offsets: `[B + 1]`; a user may have no tokens.
            timestamps: int64 `[T]`, seconds.

        Returns:
            H_enhanced `[T, D]`, in the dtype of `embeddings`.

        Raises:
            ValueError: from `partition_sessions`, or embeddings that are not `[T, D]`.
        """
        if embeddings.shape != (timestamps.numel(), self.embedding_dim):
            raise ValueError(
                f"embeddings must be [{timestamps.numel()}, {self.embedding_dim}], one row a "
                f"timestamp, got {list(embeddings.shape)}"
            )
        sessions = partition_sessions(timestamps, offsets, self.gap_seconds)
        history = embeddings.to(self.session_cls.dtype)
        encoded = self._choose(sessions)
        vectors = self._encode_sessions(history, encoded)
        context = self._context(vectors, encoded, sessions)
        return self._fuse(history, context, sessions).to(embeddings.dtype)

    def _choose(self, sessions: Sessions) -> _EncodedSessions:
        """The sessions somebody will read, and their most recent tokens."""
        available = sessions.user_offsets.diff()
        if self.causal:  # nobody comes after a user's last session
            counts, starts = (available - 1).clamp(min=0), sessions.user_offsets[:-1]
        else:
            counts = available.clamp(max=self.max_sessions)
            starts = sessions.user_offsets[1:] - counts
        chosen = ranges(starts, counts)
        lengths = sessions.session_offsets.diff()[chosen].clamp(max=self.max_session_length)
        return _EncodedSessions(
            token_starts=sessions.session_offsets[1:][chosen] - lengths,
            token_lengths=lengths,
            user_offsets=complete_cumsum(counts),
        )

    def _encode_sessions(self, history: Tensor, encoded: _EncodedSessions) -> Tensor:
        """Eq. 1: `[T, D]` -> one vector a session `[S', D]`."""
        spans = Spans(encoded.token_starts, encoded.token_lengths)
        inputs = history, self.item_position, self.session_cls
        if self.num_layers > 1:
            x, offsets = gather_spans(*inputs, spans)
            return self.intra_encoder.first_tokens(x, segment_layout(offsets))
        layer = self.intra_encoder.first_layer
        norm, heads = layer.attention_norm, layer.head_weights()
        weights = PoolWeights(norm.weight, norm.bias, heads.query, heads.query_bias, heads.key)
        pooled = session_pool(*inputs, weights, spans)
        x = self.intra_encoder.final_norm(layer.finish_pooled(pooled.lead, pooled.means, heads))
        return x if pooled.place is None else x.index_select(0, pooled.place)

    def _context(self, vectors: Tensor, encoded: _EncodedSessions, sessions: Sessions) -> Tensor:
        """Eq. 2: session vectors `[S', D]` -> the F of every session's tokens `[S, D]`."""
        count = sessions.session_offsets.numel() - 1
        user = segment_ids(sessions.user_offsets, count)
        x, rows = self._number_sessions(vectors, encoded.user_offsets)
        # Rows are broadcast by F.embedding, not by indexing: its backward adds up a user's
        # sessions in a fixed order on CUDA too.
        if self.causal:
            leads = int(self.pooling == "cls")
            layout = segment_layout(rows, causal=True, window=self.max_sessions, sink=leads == 1)
            x = self._pool_all(x, layout)
            earlier = segment_positions(sessions.user_offsets, count)
            row = torch.where(earlier > 0, rows[user] + leads + earlier, 0)
            return F.embedding(row, torch.cat([x.new_zeros(1, x.shape[1]), x]))
        layout = segment_layout(rows)
        if self.pooling == "cls":
            return F.embedding(user, self.inter_encoder.first_tokens(x, layout))
        return F.embedding(rows[user], self._pool_all(x, layout))

    def _number_sessions(self, vectors: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        """Add positions to the session vectors and lead with the second [CLS], if there is one."""
        user = segment_ids(offsets, len(vectors))
        place = torch.arange(len(vectors), device=offsets.device)
        if self.causal:
            number = (place - offsets[user]).clamp(max=self.max_sessions - 1)
        else:
            number = offsets[user + 1] - 1 - place
        x = vectors + F.embedding(number, self.session_position)
        if self.pooling == "mean":
            return x, offsets
        return lead_with(self.history_cls, x, offsets, user)

    def _pool_all(self, x: Tensor, layout: SegmentLayout) -> Tensor:
        """The pooled context as each row sees it, `[R, D]` -> `[R, D]`."""
        x = self.inter_encoder(x, layout)
        return segment_mean(x, layout) if self.pooling == "mean" else x

    def _fuse(self, history: Tensor, context: Tensor, sessions: Sessions) -> Tensor:
        if self.fusion == "add":
            return history + F.embedding(sessions.session_index, context)
        context = F.layer_norm(context, context.shape[1:])
        return add_context(history, context, self.gate, sessions.session_offsets)
