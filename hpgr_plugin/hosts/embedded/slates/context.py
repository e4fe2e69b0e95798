"""The context encoder of slate models: a user's history to the tokens that decoders attend to."""

from __future__ import annotations

from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from hpgr_plugin.components.checks import check_at_least, check_choice
from hpgr_plugin.components.slates.blocks import Context
from hpgr_plugin.components.transformer import JaggedEncoder
from hpgr_plugin.data.batch import Batch
from hpgr_plugin.hosts.embedded.model.bias import RelativeBias
from hpgr_plugin.hosts.embedded.model.encoder import runs_jagged
from hpgr_plugin.hosts.embedded.model.hstu import HSTULayer, initialise_linear
from hpgr_plugin.ops.hstu_attention import AttentionSpec, Places
from hpgr_plugin.ops.jagged import (
    jagged_to_padded_dense,
    lead_with,
    segment_ids,
    segment_positions,
)
from hpgr_plugin.ops.segments import segment_layout

Encoder = Literal["hstu", "transformer"]


class ContextEncoder(nn.Module):
    """Causal layers over `[start, h_1 .. h_N]`; the start token stands for an empty history.

    Args:
        encoder: "hstu" (pointwise attention with a bias by position and time) or "transformer".
        embedding_dim: D.
        num_heads: attention heads.
        num_layers: depth.
        dropout: inside the layers.
        max_history: longest history, the n of HSTU's 1 / n.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        embedding_dim: int,
        num_heads: int,
        num_layers: int,
        dropout: float,
        max_history: int,
    ) -> None:
        super().__init__()
        check_choice(get_args(Encoder), encoder=encoder)
        check_at_least(1, max_history=max_history, encoder_layers=num_layers)
        sizes = {"embedding_dim": embedding_dim, "num_heads": num_heads}
        self.start = nn.Parameter(torch.randn(embedding_dim))
        self.transformer = self.hstu = None
        self.num_heads = num_heads
        if encoder == "transformer":
            self.transformer = JaggedEncoder(
                **sizes, num_layers=num_layers, dropout=dropout, final_norm=True
            )
            return
        self.hstu = nn.ModuleList(HSTULayer(**sizes, dropout=dropout) for _ in range(num_layers))
        initialise_linear(self.hstu)
        self.bias = RelativeBias(num_layers=num_layers)
        self.norm = nn.LayerNorm(embedding_dim)
        self.alpha = (embedding_dim // num_heads) ** -0.5
        self.norm_length = float(max_history + 1)

    def forward(self, history: Tensor, batch: Batch) -> Context:
        """History tokens `[T, D]` to `[B, 1 + N, D]`, the start token first.

        Args:
            history: the embedded history of the batch.
            batch: whose it is.
        """
        owner = segment_ids(batch.history_offsets, len(history))
        start = self.start.to(history.dtype)
        tokens, offsets = lead_with(start, history, batch.history_offsets, owner)
        lengths = offsets.diff()
        longest = int(lengths.max())
        real = torch.arange(longest, device=lengths.device) < lengths.unsqueeze(1)
        if self.transformer is not None:
            tokens = self.transformer(tokens, segment_layout(offsets, causal=True))
            return Context(jagged_to_padded_dense(tokens, offsets, longest), real)
        places = _places(batch, offsets, len(tokens))
        if runs_jagged(tokens, self.num_heads):
            spec = self._spec(offsets, longest, places)
            return Context(jagged_to_padded_dense(self._hstu(tokens, spec), offsets, longest), real)
        padded = jagged_to_padded_dense(tokens, offsets, longest)
        columns = torch.stack(places[:2], 1)
        positions, times = jagged_to_padded_dense(columns, offsets, longest).flatten(0, 1).T
        every = torch.arange(len(lengths) + 1, device=lengths.device) * longest
        # Padding comes last, so no token sees it.
        spec = self._spec(every, longest, Places(positions, times), padded=True)
        return Context(self._hstu(padded.flatten(0, 1), spec).view_as(padded), real)

    def _spec(
        self, offsets: Tensor, longest: int, places: Places, *, padded: bool = False
    ) -> AttentionSpec:
        return AttentionSpec(
            offsets=offsets,
            max_length=longest,
            alpha=self.alpha,
            norm_length=self.norm_length,
            places=places,
            exact=True,
            padded=padded,
        )

    def _hstu(self, x: Tensor, spec: AttentionSpec) -> Tensor:
        """HSTU layers over the tokens `[T, D]` of a specification."""
        domains = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        for depth, layer in enumerate(cast(nn.ModuleList, self.hstu)):
            x = layer(x, domains=domains, spec=spec, bias=self.bias(depth))
        output: Tensor = self.norm(x)
        return output


def _places(batch: Batch, offsets: Tensor, count: int) -> Places:
    """Place and time of every token; the start token has the time of the first item.

    Args:
        batch: with the histories.
        offsets: int64 `[B + 1]` of the tokens, a start token before every history.
        count: tokens.
    """
    place = segment_positions(offsets, count)
    times = batch.history_timestamps
    if not len(times):
        return Places(place, torch.zeros_like(place))
    item = batch.history_offsets[segment_ids(offsets, count)] + (place - 1).clamp(min=0)
    return Places(place, times[item.clamp(max=len(times) - 1)])
