"""Decoding of slates with cached keys and values: HiGR against flat autoregression over the slate.

Decoders of the same width, blocks and catalogue answer the same contexts, which are encoded
already: what is timed is decoding alone. Weights are random; the time does not depend on them.
"""

from typing import NamedTuple

import torch

from examples.benchmarks.registry import check, print_table, time_ms
from hpgr_plugin.components.slates.beam import Allowed
from hpgr_plugin.components.slates.blocks import Context
from hpgr_plugin.components.slates.decoder import (
    DecoderSizes,
    FlatSlateDecoder,
    HierarchicalDecoder,
    SlateDecoder,
)
from hpgr_plugin.components.slates.semantic_ids import SemanticIds

SLATE, BEAMS = 5, 5
ITEMS, CODEBOOK, LEVELS = 4000, 64, 3


class Size(NamedTuple):
    """A decoder of either kind; a flat one has as many blocks as planner and generator together."""

    width: int
    heads: int
    planner: int
    generator: int


MOVIELENS = Size(128, 4, 4, 1)  # configs/models/slates.gin
PAPER = Size(512, 8, 14, 2)


def run(*, quick: bool) -> None:
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    if not on_gpu:
        torch.set_num_threads(2)
    rows: list[dict[str, object]] = []
    batches = (256, 1024) if on_gpu else (1, 32)
    for size in (MOVIELENS, PAPER):
        models = _models(size, device)
        for history in (200,) if quick else (50, 200):
            for batch in batches[:1] if quick else batches:
                rows += _measure(*models, size, batch, history, device)
    print_table(rows)


def _models(size: Size, device: torch.device) -> tuple[SlateDecoder, SlateDecoder]:
    """HiGR's decoder and the flat one."""
    torch.manual_seed(0)
    ids = SemanticIds(torch.randint(0, CODEBOOK, (ITEMS, LEVELS)), codebook_size=CODEBOOK)
    sizes = DecoderSizes(
        embedding_dim=size.width, num_heads=size.heads, dropout=0.0, slate_size=SLATE
    )
    higr = HierarchicalDecoder(
        ids=ids, sizes=sizes, planner_layers=size.planner, generator_layers=size.generator
    )
    flat = FlatSlateDecoder(ids=ids, sizes=sizes, num_layers=size.planner + size.generator)
    return higr.to(device).eval(), flat.to(device).eval()


@torch.no_grad()
def _measure(
    higr: SlateDecoder,
    flat: SlateDecoder,
    size: Size,
    batch: int,
    history: int,
    device: torch.device,
) -> list[dict[str, object]]:
    tokens = torch.randn(batch, history, size.width, device=device)
    context = Context(tokens, torch.ones(batch, history, dtype=torch.bool, device=device))
    excluded = torch.rand(batch, ITEMS, device=device) < history / ITEMS
    times = {}
    for name, model, width in (
        ("flat, beam", flat, BEAMS),
        ("flat, greedy", flat, 1),
        ("HiGR, beam", higr, BEAMS),
        ("HiGR, greedy", higr, 1),
    ):
        allowed = Allowed.all_but(model.ids, excluded, least=SLATE)
        slates = model.generate(context, allowed, width=width)
        forced = model.log_probs(context, slates.items).sum(2)
        check(f"{name} batch={batch}", slates.log_probs, forced, 1e-4)
        times[name] = time_ms(
            lambda m=model, a=allowed, w=width: m.generate(context, a, width=w), budget_ms=2000
        )
    return [
        {
            "width": size.width,
            "blocks": f"{size.planner} + {size.generator}",
            "batch": batch,
            "history": history,
            "decoding": name,
            "ms": ms,
            "thousand slates a minute": batch / ms * 60,
            "of flat beam": times["flat, beam"] / ms,
            "of flat greedy": times["flat, greedy"] / ms,
        }
        for name, ms in times.items()
    ]
