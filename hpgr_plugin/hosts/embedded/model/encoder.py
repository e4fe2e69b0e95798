"""A stack of HSTU or MTGR layers over jagged token sequences, read at the candidates."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hpgr_plugin.components.transformer import plan_buckets
from hpgr_plugin.hosts.embedded.model.bias import RelativeBias
from hpgr_plugin.hosts.embedded.model.hstu import HSTULayer, initialise_linear
from hpgr_plugin.hosts.embedded.model.mtgr import MTGRLayer
from hpgr_plugin.hosts.embedded.model.padded import PaddedTokens, pad
from hpgr_plugin.hosts.embedded.model.tokens import TokenSequence
from hpgr_plugin.ops.jagged import ranges
from hpgr_plugin.ops.preference_plan.plan import PreferencePlan

LAYERS: dict[str, type[nn.Module]] = {"hstu": HSTULayer, "mtgr": MTGRLayer}


class SequenceEncoder(nn.Module):
    """``num_layers`` layers of one kind; the last computes the candidates' rows alone.

    Args:
        layer: ``"hstu"`` or ``"mtgr"``.
        embedding_dim: ``D``.
        num_layers: depth.
        num_heads: attention heads.
        dropout: inside the layers.
        norm_length: the ``n`` of the attention's ``1 / n``, that of a full sequence.
        relative_bias: add the bias by position and time.
    """

    def __init__(
        self,
        *,
        layer: str,
        embedding_dim: int,
        num_layers: int,
        num_heads: int,
        dropout: float,
        norm_length: float,
        relative_bias: bool,
    ) -> None:
        super().__init__()
        if embedding_dim % num_heads:
            raise ValueError(
                f"embedding_dim must be a multiple of num_heads, got {embedding_dim}, {num_heads}"
            )
        if num_layers < 1:
            raise ValueError(f"num_layers must be 1 or more, got {num_layers}")
        self.layers = nn.ModuleList(
            LAYERS[layer](embedding_dim=embedding_dim, num_heads=num_heads, dropout=dropout)
            for _ in range(num_layers)
        )
        initialise_linear(self.layers)
        self.bias = RelativeBias(num_layers=num_layers) if relative_bias else None
        self.norm_length = norm_length

    def forward(
        self,
        sequence: TokenSequence,
        *,
        mask_position: str = "post",
        use_column_weights: bool = False,
        row_plan: PreferencePlan | None = None,
    ) -> Tensor:
        """Encode and return the candidates, ``[C, D]``, in the order of the sequences.

        Args:
            sequence: the tokens.
            mask_position: where PGSA's weights go, ``"post"`` or ``"pre"`` the activation.
            use_column_weights: read the tokens' weights (sequence and user layout).
            row_plan: weights of the candidates' rows (candidate layout), indices into the tokens.
        """
        groups = [None] if row_plan is not None else _length_groups(sequence.offsets.diff())
        outputs, places = [], []
        starts = sequence.candidates_per_sequence.cumsum(0) - sequence.candidates_per_sequence
        for chosen in groups:
            part = sequence if chosen is None else sequence.select(chosen)
            padded = pad(
                part,
                bias=self.bias,
                norm_length=self.norm_length,
                mask_position=mask_position,
                use_column_weights=use_column_weights,
                row_plan=row_plan,
            )
            outputs.append(self._encode(padded))
            if chosen is not None:
                places.append(ranges(starts[chosen], part.candidates_per_sequence))
        if not places:
            return outputs[0]
        back = torch.cat(places).argsort()
        return torch.cat(outputs).index_select(0, back)

    def _encode(self, padded: PaddedTokens) -> Tensor:
        x = padded.values
        for depth in range(len(self.layers) - 1):
            x = self._layer(depth, x, padded)
        last = self._last_layer(x, padded)
        return last.flatten(0, 1).index_select(0, padded.candidate_index)

    def _layer(self, depth: int, x: Tensor, padded: PaddedTokens) -> Tensor:
        attention = padded.attention
        bias = None if self.bias is None else self.bias(depth, attention.buckets)
        return self.layers[depth](x, domains=padded.domains, attention=attention, bias=bias)

    def _last_layer(self, x: Tensor, padded: PaddedTokens) -> Tensor:
        """Only the candidates' rows are read, so only they are computed."""
        depth = len(self.layers) - 1
        attention = padded.attention.take_rows(padded.candidate_rows)
        bias = None if self.bias is None else self.bias(depth, attention.buckets)
        return self.layers[depth](
            x,
            domains=padded.domains,
            attention=attention,
            bias=bias,
            rows=padded.candidate_rows,
        )


def _length_groups(lengths: Tensor) -> list[Tensor | None]:
    """Sequences of similar length, as index tensors; ``[None]`` when one group does."""
    order = lengths.argsort(descending=True, stable=True)
    distinct, counts = (part.flip(0).tolist() for part in lengths.unique(return_counts=True))
    sizes = [rows for rows, _, _ in plan_buckets(distinct, counts)]
    return [None] if len(sizes) <= 1 else list(order.split(sizes))
