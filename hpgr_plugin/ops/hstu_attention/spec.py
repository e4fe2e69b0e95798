"""What HSTU attention reads beside q, k and v: the sequences, who sees whom, and the weights."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from torch import Tensor

MaskPosition = Literal["post", "pre"]


class Visibility(NamedTuple):
    """An explicit order: query i sees column j if `key_order[j] < query_order[i]`, or j is itself.

    Attributes:
        key_order: int64 `[T]`.
        query_order: int64 `[T]`, of every token, also of those that are no query.
    """

    key_order: Tensor
    query_order: Tensor


class Places(NamedTuple):
    """Where and when the tokens are in their full sequence, for a relative bias.

    Attributes:
        positions: int64 `[T]`.
        timestamps: int64 `[T]` seconds.
        query_positions: int64 `[T]`, where a token stands as a query, also of those that are no
            query; None: at its position.
    """

    positions: Tensor
    timestamps: Tensor
    query_positions: Tensor | None = None

    @property
    def of_queries(self) -> Tensor:
        """Where the tokens stand as queries, int64 `[T]`."""
        return self.positions if self.query_positions is None else self.query_positions


class PositionTimeBias(NamedTuple):
    """`b_ij = position_table[bucket(p_i - p_j)] + time_table[log2(1 + |t_i - t_j|)]`.

    All heads share it. It reads the tokens' own positions and times, so it is the same for two
    tokens whether the history between them was shortened or not.

    Attributes:
        position_table: `[2 P]`; distances below `exact_positions` have a bucket each, larger ones
            share logarithmic buckets; the second half is for keys that come later.
        time_table: `[S]`, the last bucket takes everything beyond.
        exact_positions: below P.
    """

    position_table: Tensor
    time_table: Tensor
    exact_positions: int


@dataclass(frozen=True, eq=False, kw_only=True)
class AttentionSpec:
    """The sequences of one attention, the same for all layers of a step.

    Attributes:
        offsets: int32 or int64 `[B + 1]` of keys and values.
        max_length: upper bound of the sequence lengths, known without asking the device.
        alpha: factor of `q . k`.
        norm_length: n of the `1 / n`: the length of the full, not of a shortened sequence.
        causal: a query sees itself and the columns before it. False: every column of its sequence;
            `row_weights` then say which of them count.
        query_offsets: `[B + 1]` of the queries, where they are not all tokens. Without `query_rows`
            they are the last tokens of every sequence.
        max_query_length: upper bound of the queries per sequence; None: `max_length`.
        query_rows: int64 `[Tq]`, the token that each query is, in rows of k.
        num_targets: int `[B]`: so many tokens at the end of each sequence are seen only by
            themselves. None: no such tokens.
        visibility: an explicit order in place of `causal` and `num_targets`.
        column_weights: M `[T]` (Eq. 5), one weight per column, without gradient.
        row_weights: M `[Tq, max_length]`, one weight per query and column, without gradient.
        weight_offsets: `[B + 1]` of row_weights `[W, max_length]`, where only the last queries of
            every sequence have them; for the others they are ones.
        mask_position: where M enters, "post" `SiLU(s) M` or "pre" `SiLU(M s)`.
        places: positions and times of the tokens, for a bias.
        exact: the last sequence ends where the tensors end: there are no spare rows to zero.
        padded: every sequence has exactly `max_length` tokens and `max_query_length` queries, so
            that padding is a view.
    """

    offsets: Tensor
    max_length: int
    alpha: float
    norm_length: float
    causal: bool = True
    query_offsets: Tensor | None = None
    max_query_length: int | None = None
    query_rows: Tensor | None = None
    num_targets: Tensor | None = None
    visibility: Visibility | None = None
    column_weights: Tensor | None = None
    row_weights: Tensor | None = None
    weight_offsets: Tensor | None = None
    mask_position: MaskPosition = "post"
    places: Places | None = None
    exact: bool = False
    padded: bool = False
    # What a backend derives from all of this once per step, and every layer reads.
    cache: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    @property
    def query_length(self) -> int:
        """Upper bound of the queries per sequence."""
        return self.max_length if self.max_query_length is None else self.max_query_length

    def replace(self, **changes: Any) -> AttentionSpec:
        """A copy with other fields, and nothing derived yet."""
        return dataclasses.replace(self, **changes)

    def check(self, q: Tensor, k: Tensor, v: Tensor, bias: PositionTimeBias | None) -> None:
        """Shapes that fit together.

        Raises:
            ValueError: naming the first that does not.
        """
        if self.mask_position not in ("post", "pre"):
            raise ValueError(f"mask_position must be 'post' or 'pre', got {self.mask_position!r}")
        if q.dim() != 3 or k.dim() != 3 or v.dim() != 3:
            raise ValueError(
                "q, k and v must be [T, H, d], got "
                f"{list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
            )
        if k.shape[:2] != v.shape[:2] or q.shape[1:] != k.shape[1:]:
            raise ValueError(
                "q and k must agree in heads and size, k and v in rows and heads, got "
                f"{list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
            )
        if self.query_offsets is None and q.shape[0] != k.shape[0]:
            raise ValueError(
                f"q has {q.shape[0]} rows and k {k.shape[0]}: give query_offsets where they differ"
            )
        if self.query_offsets is not None and self.query_offsets.shape != self.offsets.shape:
            raise ValueError(
                f"query_offsets must be {list(self.offsets.shape)} as offsets, "
                f"got {list(self.query_offsets.shape)}"
            )
        _check_shape("column_weights", self.column_weights, (k.shape[0],))
        weighted = self.row_weights
        if weighted is not None:
            rows = q.shape[0] if self.weight_offsets is None else len(weighted)
            _check_shape("row_weights", weighted, (rows, self.max_length))
        if self.weight_offsets is not None and self.weight_offsets.shape != self.offsets.shape:
            raise ValueError(
                f"weight_offsets must be {list(self.offsets.shape)} as offsets, "
                f"got {list(self.weight_offsets.shape)}"
            )
        _check_shape("query_rows", self.query_rows, (q.shape[0],))
        if bias is not None and self.places is None:
            raise ValueError("a bias needs places, the positions and times of the tokens, got None")


def _check_shape(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    if tensor is not None and tensor.shape != shape:
        raise ValueError(f"{name} must be {list(shape)}, got {list(tensor.shape)}")
