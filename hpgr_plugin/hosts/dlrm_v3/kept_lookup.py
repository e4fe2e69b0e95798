"""Kept rows out of looked-up ones, with a gradient that costs what is kept.

The gradient of rows that were selected out of a lookup is as long as the whole lookup, and almost
all of it is zero: at half a million history items that is most of a short step's backward. Where
autograd shows that rows come straight out of a table, the kept ones are looked up again, together
with all others of that table: a table then gets its gradient once.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def select_kept(
    looked_up: Mapping[str, Tensor], kept: Tensor, histories: Collection[str]
) -> dict[str, Tensor]:
    """`rows[kept]` of some features, with the same gradient in their tables.

    Args:
        looked_up: `[T, D]` of histories, any number of rows of others, by feature.
        kept: int64 `[P]`, rows of the histories.
        histories: the features to select from.

    Returns:
        `[P, D]` of the histories, and other features that were looked up again.
    """
    selected: dict[str, Tensor] = {}
    tables: dict[int, tuple[Tensor, dict[str, Tensor]]] = {}
    for name, rows in looked_up.items():
        lookup = _plain_lookup(rows)
        if lookup is not None:
            index, table = lookup
            tables.setdefault(id(table), (table, {}))[1][name] = index
        elif name in histories:
            selected[name] = rows.index_select(0, kept)
    for table, features in tables.values():
        if features.keys().isdisjoint(histories):
            continue  # nothing is left out: these lookups stay
        parts = [i.index_select(0, kept) if n in histories else i for n, i in features.items()]
        rows = F.embedding(torch.cat(parts), table)
        selected.update(zip(features, rows.split([len(part) for part in parts]), strict=True))
    return selected


def _plain_lookup(rows: Tensor) -> tuple[Tensor, Tensor] | None:
    """The index `[T]` and the table `[V, D]` that rows come from, or None.

    None unless they are the output of `F.embedding` as it was, nobody asked for their gradient,
    and the table is a leaf of autograd. Not noticed: hooks on the node of the lookup itself, and a
    table that changed after it, whose new rows are then taken.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return None
    node: Any = rows.grad_fn
    if node is None or node.name() != "EmbeddingBackward0":
        return None
    if rows._version or rows.retains_grad or rows._backward_hooks or _is_unusual(node):
        return None
    source: Any = node.next_functions[0][0]
    if source is None or source.name() != "torch::autograd::AccumulateGrad":
        return None
    try:
        index: Tensor = node._saved_indices
    except RuntimeError:  # a backward has freed it, or it was changed in place
        return None
    table: Tensor = source.variable
    if table.shape[1:] != rows.shape[1:] or index.shape != rows.shape[:1]:
        return None
    return index, table


def _is_unusual(node: Any) -> bool:
    """Whether the lookup scales gradients by frequency, makes sparse ones, or has a padding row."""
    no_padding = node._saved_padding_idx in (-1, 2**64 - 1)
    return bool(node._saved_scale_grad_by_freq or node._saved_sparse or not no_padding)
