"""The transformer block of slate decoders, with cached keys and values.

    h += CrossAttn(RMSNorm(h); K, V from the context)
    h += SelfAttn(RMSNorm(h))
    h += FFN(RMSNorm(h))

Tokens are `[B, G, N, D]`: G groups of a user (slots, or beams) attend each to itself, causally,
and all of them to the user's context, whose keys and values are computed once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel

from hpgr_plugin.components.checks import check_at_least
from hpgr_plugin.components.transformer import INIT_STD
from hpgr_plugin.errors import HpgrError
from hpgr_plugin.ops.segments import SDPA_BACKENDS


class Context(NamedTuple):
    """What a decoder reads: the encoded histories of B users, padded, and the item table.

    Attributes:
        tokens: `[B, N, D]`.
        real: bool `[B, N]`, False for padding; every user has at least one token.
        items: `[V, D]`, for decoders that score items; None for the others.
    """

    tokens: Tensor
    real: Tensor
    items: Tensor | None = None


class Memory(NamedTuple):
    """Keys and values `[B, H, N, d]` of the context for one block, and its `[B, 1, 1, N]` mask."""

    keys: Tensor
    values: Tensor
    mask: Tensor


class Cache:
    """Keys and values of the tokens decoded so far, one pair for every block."""

    def __init__(self) -> None:
        self.blocks: dict[int, tuple[Tensor, Tensor]] = {}

    def extend(self, block: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append `[B, G, H, 1, d]` to a block's cache and return all of it."""
        if block in self.blocks:
            past = self.blocks[block]
            keys, values = (torch.cat(p, dim=3) for p in zip(past, (keys, values), strict=True))
        self.blocks[block] = keys, values
        return keys, values

    def select(self, origin: Tensor) -> None:
        """Continue groups `origin` `[B, G']` in place of the groups so far."""
        user = torch.arange(len(origin), device=origin.device).unsqueeze(1)
        self.blocks = {
            block: (keys[user, origin], values[user, origin])
            for block, (keys, values) in self.blocks.items()
        }


class DecoderBlock(nn.Module):
    """Cross-attention, causal self-attention and a feed-forward, each behind an RMS norm."""

    def __init__(self, *, embedding_dim: int, num_heads: int, dropout: float, cross: bool) -> None:
        super().__init__()
        self.num_heads, self.cross = num_heads, cross
        if cross:
            self.cross_norm = nn.RMSNorm(embedding_dim)
            self.key_norm = nn.RMSNorm(embedding_dim)
            self.value_norm = nn.RMSNorm(embedding_dim)
            self.cross_query = nn.Linear(embedding_dim, embedding_dim, bias=False)
            self.cross_key = nn.Linear(embedding_dim, embedding_dim, bias=False)
            self.cross_value = nn.Linear(embedding_dim, embedding_dim, bias=False)
            self.cross_output = nn.Linear(embedding_dim, embedding_dim, bias=False)
        self.self_norm = nn.RMSNorm(embedding_dim)
        self.qkv = nn.Linear(embedding_dim, 3 * embedding_dim, bias=False)
        self.self_output = nn.Linear(embedding_dim, embedding_dim, bias=False)
        self.feedforward_norm = nn.RMSNorm(embedding_dim)
        self.expand = nn.Linear(embedding_dim, 4 * embedding_dim)
        self.contract = nn.Linear(4 * embedding_dim, embedding_dim)
        self.dropout = nn.Dropout(dropout)
        for child in self.children():
            if isinstance(child, nn.Linear):
                nn.init.normal_(child.weight, std=INIT_STD)

    def memory(self, context: Context) -> Memory | None:
        """Keys and values of the context, computed once per request.

        Args:
            context: its tokens brought to a mean square of 1: what is left of the two norms is
                their weights, and those are taken into the projections.
        """
        if not self.cross:
            return None
        keys = self.cross_key.weight * self.key_norm.weight
        values = self.cross_value.weight * self.value_norm.weight
        both = F.linear(context.tokens, torch.cat([keys, values]))
        found_keys, found_values = (self._heads(x) for x in both.chunk(2, dim=-1))
        return Memory(found_keys, found_values, context.real[:, None, None, :])

    def forward(self, h: Tensor, memory: Memory | None, cache: Cache | None, number: int) -> Tensor:
        """Tokens `[B, G, N, D]` to the same; with a cache N is 1, the token that follows it."""
        if memory is not None:
            h = h + self.dropout(self._attend_context(h, memory))
        h = h + self.dropout(self._attend_self(h, cache, number))
        hidden = F.gelu(self.expand(self.feedforward_norm(h)))
        return h + self.dropout(self.contract(hidden))

    def _attend_context(self, h: Tensor, memory: Memory) -> Tensor:
        queries = self._heads(self.cross_query(self.cross_norm(h)).flatten(1, 2))
        with sdpa_kernel(SDPA_BACKENDS):
            attended = F.scaled_dot_product_attention(
                queries, memory.keys, memory.values, attn_mask=memory.mask
            )
        output: Tensor = self.cross_output(attended.transpose(1, 2).reshape(h.shape))
        return output

    def _attend_self(self, h: Tensor, cache: Cache | None, number: int) -> Tensor:
        q, k, v = (self._heads(x) for x in self.qkv(self.self_norm(h)).chunk(3, dim=-1))
        if cache is not None:
            k, v = cache.extend(number, k, v)
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        with sdpa_kernel(SDPA_BACKENDS):
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=cache is None)
        attended = attended.transpose(1, 2).reshape(h.shape)
        output: Tensor = self.self_output(attended)
        return output

    def _heads(self, x: Tensor) -> Tensor:
        """`[..., N, D]` to `[..., H, N, d]`."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(-2, -3)


class DecoderStack(nn.Module):
    """Blocks, a last norm and a linear output.

    Args:
        num_layers: blocks.
        embedding_dim: D, a multiple of `num_heads`.
        num_heads: attention heads.
        dropout: in [0, 1).
        cross: whether the blocks read the context.

    Raises:
        HpgrError: sizes that do not fit together.
    """

    def __init__(
        self, num_layers: int, *, embedding_dim: int, num_heads: int, dropout: float, cross: bool
    ) -> None:
        super().__init__()
        check_at_least(1, num_layers=num_layers, embedding_dim=embedding_dim, num_heads=num_heads)
        if embedding_dim % num_heads:
            raise HpgrError(
                f"embedding_dim must be a multiple of num_heads, got {embedding_dim}, {num_heads}"
            )
        self.blocks = nn.ModuleList(
            DecoderBlock(
                embedding_dim=embedding_dim, num_heads=num_heads, dropout=dropout, cross=cross
            )
            for _ in range(num_layers)
        )
        self.norm = nn.RMSNorm(embedding_dim)
        self.output = nn.Linear(embedding_dim, embedding_dim)

    def memory(self, context: Context) -> list[Memory | None]:
        """What the blocks read of the context."""
        tokens = context.tokens
        context = context._replace(tokens=F.rms_norm(tokens, tokens.shape[-1:]))
        return [block.memory(context) for block in self.blocks]  # type: ignore[operator]

    def forward(self, h: Tensor, memory: list[Memory | None], cache: Cache | None = None) -> Tensor:
        """Tokens `[B, G, N, D]` to the same."""
        for number, (block, part) in enumerate(zip(self.blocks, memory, strict=True)):
            h = block(h, part, cache, number)
        output: Tensor = self.output(self.norm(h))
        return output
