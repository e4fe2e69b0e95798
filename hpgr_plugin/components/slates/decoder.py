"""Slate decoders: HiGR's planner and generator, and the flat autoregressions beside it.

All of them give `log_probs` (teacher-forced, for training) and `generate` (cached, restricted to
the trie), from the same blocks and the same semantic ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpgr_plugin.components.checks import check_at_least
from hpgr_plugin.components.slates.beam import Allowed, Beams, child_log_probs, expand, start_beams
from hpgr_plugin.components.slates.blocks import Cache, Context, DecoderStack, Memory
from hpgr_plugin.components.slates.semantic_ids import SemanticIds
from hpgr_plugin.components.transformer import INIT_STD
from hpgr_plugin.errors import HpgrError


class Slates(NamedTuple):
    """Generated slates.

    Attributes:
        items: int64 `[B, M]`, all different in a slate.
        log_probs: `[B, M]`, of each item given the ones before it.
    """

    items: Tensor
    log_probs: Tensor


@dataclass(frozen=True, kw_only=True)
class DecoderSizes:
    """The sizes of the slate model, which its decoder follows.

    Attributes:
        embedding_dim: D.
        num_heads: attention heads.
        dropout: inside the blocks.
        slate_size: M.
    """

    embedding_dim: int
    num_heads: int
    dropout: float
    slate_size: int

    def stack(self, num_layers: int, *, cross: bool) -> DecoderStack:
        """Blocks of these sizes; `cross` as in `DecoderStack`."""
        return DecoderStack(
            num_layers,
            embedding_dim=self.embedding_dim,
            num_heads=self.num_heads,
            dropout=self.dropout,
            cross=cross,
        )


class SlateDecoder(nn.Module):
    """The interface; `hpgr.SlateModel.decoder` takes a subclass.

    Args:
        ids: semantic ids of the catalogue.
        sizes: of the model.
    """

    def __init__(self, *, ids: SemanticIds, sizes: DecoderSizes) -> None:
        super().__init__()
        embedding_dim, slate_size = sizes.embedding_dim, sizes.slate_size
        check_at_least(1, slate_size=slate_size)
        if ids.num_items < slate_size:
            raise HpgrError(f"a slate of {slate_size} needs as many items, got {ids.num_items}")
        self.ids, self.slate_size = ids, slate_size
        self.settings: dict[str, Any] = {}  # arguments of the subclass, for files
        self.digit_tables = nn.ModuleList(
            nn.Embedding(size, embedding_dim) for size in ids.level_sizes
        )
        self.heads = nn.ModuleList(nn.Linear(embedding_dim, size) for size in ids.level_sizes)
        self.bos = nn.Parameter(torch.empty(embedding_dim))
        nn.init.normal_(self.bos, std=INIT_STD)
        for table, head in zip(self.digit_tables, self.heads, strict=True):
            assert isinstance(table, nn.Embedding)
            assert isinstance(head, nn.Linear)
            nn.init.normal_(table.weight, std=INIT_STD)
            nn.init.normal_(head.weight, std=INIT_STD)
            nn.init.zeros_(head.bias)
        self._scale = embedding_dim**0.5  # tables start near 0.02, tokens near 1

    @torch.no_grad()
    def start_from(self, vectors: Tensor) -> None:
        """Let the digits begin with what stage 1 knows, so that their sum is near the item's row.

        Every digit takes the mean of what the digits before it left of the rows of its items, in
        its table and in the head that predicts it.

        Args:
            vectors: `[V, D]`, the item table.
        """
        rest = vectors.clone()
        levels = zip(self.digit_tables, self.heads, self.ids.codes.unbind(1), strict=True)
        for table, head, digits in levels:
            assert isinstance(table, nn.Embedding)
            assert isinstance(head, nn.Linear)
            count = digits.bincount(minlength=len(table.weight)).unsqueeze(1)
            mean = torch.zeros_like(table.weight).index_add_(0, digits, rest) / count.clamp(min=1)
            table.weight.copy_(torch.where(count > 0, mean, table.weight))
            head.weight.copy_(table.weight)
            rest = rest - mean[digits]

    def item_vectors(self, items: Tensor) -> Tensor:
        """i = sum_d emb(s^d), `[..., D]` of items `[...]`."""
        digits = self.ids.codes[items].unbind(-1)
        vectors = [t(d) for t, d in zip(self.digit_tables, digits, strict=True)]
        return torch.stack(vectors).sum(0) * self._scale

    def digit_vectors(self, level: int, digits: Tensor) -> Tensor:
        """emb(s^d), `[..., D]` of digits `[...]` of a level."""
        vectors: Tensor = self.digit_tables[level](digits)
        return vectors * self._scale

    def digit_log_probs(self, hidden: Tensor, items: Tensor) -> Tensor:
        """log P(s^d | ...) of every digit of items.

        Args:
            hidden: `[..., L', D]`, the output before each digit that is decoded.
            items: int64 `[...]`.

        Returns:
            `[..., L]`; 0 for digits that leave no choice.
        """
        found = []
        for level in range(self.ids.num_decoded):
            nodes = self.ids.item_nodes[items, level]
            children = self.ids.below(level, nodes)
            log_probs = child_log_probs(self.heads[level](hidden[..., level, :]), children)
            place = self.ids.item_nodes[items, level + 1] - children.nodes[..., 0]
            found.append(log_probs.gather(-1, place.unsqueeze(-1)).squeeze(-1))
        log_probs = torch.stack(found, dim=-1)
        return F.pad(log_probs, (0, self.ids.num_levels - self.ids.num_decoded))

    def log_probs(self, context: Context, slates: Tensor) -> Tensor:
        """log P of every digit of slates given the digits before it: `[B, M, L]`.

        Args:
            context: of B users.
            slates: int64 `[B, M]`.
        """
        raise NotImplementedError

    def counted(self, slates: Tensor) -> Tensor:
        """Which of `log_probs` leave a choice: bool `[B, M, L]`."""
        return self.ids.is_choice(slates)

    def generate(self, context: Context, allowed: Allowed, *, width: int) -> Slates:
        """A slate for every user.

        Args:
            context: of B users.
            allowed: which items.
            width: of the beam search.
        """
        raise NotImplementedError

    def _item_tokens(self, first: Tensor, items: Tensor) -> Tensor:
        """`[first, s^1, ..]`: `[..., L', D]` for first `[..., D]` and items `[...]`."""
        digits = self.ids.codes[items].unbind(-1)[: self.ids.num_decoded - 1]
        return torch.stack([first, *(self.digit_vectors(i, d) for i, d in enumerate(digits))], -2)

    def _search_item(
        self,
        stack: DecoderStack,
        memory: list[Memory | None],
        first: Tensor,
        allowed: Allowed,
        *,
        chosen: Tensor,
        width: int,
        keep: int,
    ) -> tuple[Tensor, Tensor]:
        """Beam search over the digits of one item.

        Args:
            stack: of the generator.
            memory: of the context.
            first: `[B, D]`, the token in front of the digits.
            allowed: which items.
            chosen: int64 `[B, S]`, items already in the slate.
            width: beams.
            keep: how many of the best items to return.

        Returns:
            Items and their log-probabilities, `[B, keep]`.
        """
        beams, cache = start_beams(len(first), first.device), Cache()
        tokens = first[:, None, None]
        for level in range(self.ids.num_decoded):
            hidden = stack(tokens, memory, cache)
            last = level == self.ids.num_decoded - 1
            beams = expand(
                beams,
                self.heads[level](hidden.squeeze(2)),
                allowed,
                level=level,
                chosen=chosen.unsqueeze(1).expand(-1, beams.nodes.shape[1], -1),
                width=keep if last else width,
            )
            if not last:
                cache.select(beams.origin)
                tokens = self.digit_vectors(level, beams.digits).unsqueeze(2)
        return self.ids.items_of(beams.nodes, self.ids.num_decoded), beams.scores


class HierarchicalDecoder(SlateDecoder):
    """HiGR: a planner gives each slot a preference vector, a generator its digits.

    Planner: `[BOS, i_1 .. i_{M-1}]` -> ihat_1 .. ihat_M. Generator, shared over slots:
    `[ihat_m, s^1 .. s^{L-1}]` -> s^1 .. s^L. Slots are filled greedily, with a beam search inside
    each item, and the summed digits of the item are the planner's next input.

    With `item_scores`, which the paper does not have, ihat_m also predicts the item itself by a
    softmax over the item table. It counts as one digit more: in training, and when the items of a
    slot's beam are compared.

    Args:
        ids, sizes: see `SlateDecoder`.
        planner_layers: blocks; 0 leaves the planner out: ihat_m is then a learned vector.
        generator_layers: blocks.
        generator_context: whether the generator reads the context too.
        item_scores: whether ihat_m scores items too; `log_probs` are then `[B, M, L + 1]`.

    Raises:
        HpgrError: `item_scores` without a planner, whose ihat_m would be the same for all users.
    """

    def __init__(
        self,
        *,
        ids: SemanticIds,
        sizes: DecoderSizes,
        planner_layers: int = 4,
        generator_layers: int = 1,
        generator_context: bool = True,
        item_scores: bool = False,
    ) -> None:
        super().__init__(ids=ids, sizes=sizes)
        check_at_least(0, planner_layers=planner_layers)
        if item_scores and not planner_layers:
            raise HpgrError(
                "hpgr.HierarchicalDecoder.item_scores = True needs planner_layers of 1 or more"
            )
        self.settings = {
            "planner_layers": planner_layers,
            "generator_layers": generator_layers,
            "generator_context": generator_context,
            "item_scores": item_scores,
        }
        self.planner = sizes.stack(planner_layers, cross=True) if planner_layers else None
        self.generator = sizes.stack(generator_layers, cross=generator_context)
        size = sizes.embedding_dim
        self.item_query = nn.Linear(size, size) if item_scores else None
        self.slots = nn.Parameter(torch.empty(sizes.slate_size, sizes.embedding_dim))
        nn.init.normal_(self.slots, std=INIT_STD)

    def log_probs(self, context: Context, slates: Tensor) -> Tensor:
        """See `SlateDecoder.log_probs`."""
        plans = self._plans(context, slates)
        tokens = self._item_tokens(plans, slates)
        hidden = self.generator(tokens, self.generator.memory(context))
        found = self.digit_log_probs(hidden, slates)
        if self.item_query is None:
            return found
        of_items = self._item_log_probs(self.item_query, plans, context)
        return torch.cat([found, of_items.gather(2, slates.unsqueeze(2))], dim=2)

    def counted(self, slates: Tensor) -> Tensor:
        """See `SlateDecoder.counted`; the item itself always counts."""
        digits = super().counted(slates)
        return digits if self.item_query is None else F.pad(digits, (0, 1), value=True)

    @staticmethod
    def _item_log_probs(query: nn.Linear, plans: Tensor, context: Context) -> Tensor:
        """log P of every item by plans `[..., D]`, `[..., V]`."""
        assert context.items is not None
        scores: Tensor = query(plans) @ context.items.T
        return scores.float().log_softmax(-1)

    def _plans(self, context: Context, slates: Tensor) -> Tensor:
        """ihat `[B, M, D]`, teacher-forced."""
        if self.planner is None:
            return self.slots.expand(len(slates), -1, -1) * self._scale
        first = self.bos.expand(len(slates), 1, -1) * self._scale
        inputs = torch.cat([first, self.item_vectors(slates[:, :-1])], dim=1)
        inputs = inputs + self.slots * self._scale
        plans: Tensor = self.planner(inputs.unsqueeze(1), self.planner.memory(context))
        return plans.squeeze(1)

    def generate(self, context: Context, allowed: Allowed, *, width: int) -> Slates:
        """See `SlateDecoder.generate`: M planner steps, each with at most L generator steps."""
        size, cache = len(context.tokens), Cache()
        planner_memory = None if self.planner is None else self.planner.memory(context)
        memory = self.generator.memory(context)
        items = self.ids.codes.new_zeros(size, 0)
        scores = []
        for slot in range(self.slate_size):
            if self.planner is None or planner_memory is None:
                plan = self.slots[slot].expand(size, -1) * self._scale
            else:
                vector = self.item_vectors(items[:, -1]) if slot else self.bos * self._scale
                token = (vector + self.slots[slot] * self._scale).expand(size, -1)
                plan = self.planner(token[:, None, None], planner_memory, cache)[:, 0, 0]
            keep = 1 if self.item_query is None else width
            item, score = self._search_item(
                self.generator, memory, plan, allowed, chosen=items, width=width, keep=keep
            )
            if self.item_query is not None:
                score = score + self._item_log_probs(self.item_query, plan, context).gather(1, item)
                best = score.argmax(1, keepdim=True)
                item, score = item.gather(1, best), score.gather(1, best)
            items = torch.cat([items, item], dim=1)
            scores.append(score)
        return Slates(items, torch.cat(scores, dim=1))


class FlatDecoder(SlateDecoder):
    """What the flat autoregressions share: one stack of blocks.

    Args:
        ids, sizes: see `SlateDecoder`.
        num_layers: blocks.
    """

    def __init__(self, *, ids: SemanticIds, sizes: DecoderSizes, num_layers: int = 5) -> None:
        super().__init__(ids=ids, sizes=sizes)
        self.settings = {"num_layers": num_layers}
        self.stack = sizes.stack(num_layers, cross=True)


class FlatItemDecoder(FlatDecoder):
    """Flat autoregression over the digits of one item, as in TIGER: its best M are the slate.

    Training predicts every item of the slate from the context only. Arguments: see `FlatDecoder`.
    """

    def log_probs(self, context: Context, slates: Tensor) -> Tensor:
        """See `SlateDecoder.log_probs`; items of a slate do not depend on each other."""
        tokens = self._item_tokens((self.bos * self._scale).expand(*slates.shape, -1), slates)
        return self.digit_log_probs(self.stack(tokens, self.stack.memory(context)), slates)

    def generate(self, context: Context, allowed: Allowed, *, width: int) -> Slates:
        """See `SlateDecoder.generate`: one search of at least M beams."""
        size = len(context.tokens)
        items, scores = self._search_item(
            self.stack,
            self.stack.memory(context),
            (self.bos * self._scale).expand(size, -1),
            allowed,
            chosen=self.ids.codes.new_zeros(size, 0),
            width=max(width, self.slate_size),
            keep=self.slate_size,
        )
        return Slates(items, scores)


class FlatSlateDecoder(FlatDecoder):
    """Flat autoregression over all digits of the slate, as in OneRec: one sequence of M L tokens.

    Arguments: see `FlatDecoder`.
    """

    def __init__(self, *, ids: SemanticIds, sizes: DecoderSizes, num_layers: int = 5) -> None:
        super().__init__(ids=ids, sizes=sizes, num_layers=num_layers)
        places = torch.empty(sizes.slate_size, ids.num_levels, sizes.embedding_dim)
        self.places = nn.Parameter(places)
        nn.init.normal_(self.places, std=INIT_STD)

    def log_probs(self, context: Context, slates: Tensor) -> Tensor:
        """See `SlateDecoder.log_probs`."""
        size = len(slates)
        # The token before an item's first digit is its predecessor's summed digits, or BOS.
        first = (self.bos * self._scale).expand(size, 1, -1)
        before = torch.cat([first, self.item_vectors(slates[:, :-1])], dim=1)
        tokens = self._item_tokens(before, slates) + self.places * self._scale
        hidden = self.stack(tokens.flatten(1, 2).unsqueeze(1), self.stack.memory(context))
        return self.digit_log_probs(hidden.view_as(tokens), slates)

    def generate(self, context: Context, allowed: Allowed, *, width: int) -> Slates:
        """See `SlateDecoder.generate`: beams over whole slates; width 1 is greedy."""
        size, cache = len(context.tokens), Cache()
        memory = self.stack.memory(context)
        beams = start_beams(size, context.tokens.device)
        items = self.ids.codes.new_zeros(size, 1, 0)
        scores = beams.scores.new_zeros(size, 1, 0)
        tokens = (self.bos * self._scale).expand(size, 1, -1)
        for slot in range(self.slate_size):
            before = beams.scores
            for level in range(self.ids.num_decoded):
                place = tokens + self.places[slot, level] * self._scale
                hidden = self.stack(place.unsqueeze(2), memory, cache)
                logits = self.heads[level](hidden.squeeze(2))
                beams = expand(beams, logits, allowed, level=level, chosen=items, width=width)
                cache.select(beams.origin)
                items, scores = (_rows(x, beams.origin) for x in (items, scores))
                before = before.gather(1, beams.origin)
                tokens = self.digit_vectors(level, beams.digits)
            item = self.ids.items_of(beams.nodes, self.ids.num_decoded)
            items = torch.cat([items, item.unsqueeze(2)], dim=2)
            scores = torch.cat([scores, (beams.scores - before).unsqueeze(2)], dim=2)
            tokens = self.item_vectors(item)
            beams = Beams(torch.zeros_like(beams.nodes), *beams[1:])
        return Slates(items[:, 0], scores[:, 0])


def _rows(x: Tensor, origin: Tensor) -> Tensor:
    """Rows of beams: `[B, W, S]` at `origin` `[B, W']`."""
    return x[torch.arange(len(x), device=x.device).unsqueeze(1), origin]
