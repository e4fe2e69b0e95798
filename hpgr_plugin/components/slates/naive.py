"""Slates by full recomputation, one user at a time: the reference of cached beam decoding.

Only `log_probs` of the decoder is called, on whole slates, and the trie is a set of tuples.
"""

from __future__ import annotations

import torch

from hpgr_plugin.components.slates.blocks import Context
from hpgr_plugin.components.slates.decoder import FlatItemDecoder, SlateDecoder

Item = tuple[int, float]  # and its log-probability


def next_items(
    decoder: SlateDecoder,
    context: Context,
    slate: list[int],
    *,
    banned: set[int],
    width: int | None = None,
    keep: int = 1,
) -> list[Item]:
    """The best next items of a slate, by beam search over their digits.

    Args:
        decoder: in evaluation mode.
        context: of one user.
        slate: items chosen so far.
        banned: items that may not be chosen.
        width: of the beam; None scores every item of the catalogue.
        keep: how many.
    """
    candidates = [item for item in range(decoder.ids.num_items) if item not in {*banned, *slate}]
    digits = {item: _log_probs(decoder, context, slate, item) for item in candidates}
    codes = {item: tuple(decoder.ids.codes[item].tolist()) for item in candidates}
    levels = decoder.ids.num_decoded
    # Where the item itself has a score, it decides among all that the search found.
    scored = any(len(found) > decoder.ids.num_levels for found in digits.values())
    for level in range(levels):
        prefixes = {codes[item][: level + 1]: sum(digits[item][: level + 1]) for item in candidates}
        most = (keep if level == levels - 1 and not scored else width) or len(prefixes)
        if width is None and level < levels - 1:
            most = len(prefixes)
        best = set(sorted(prefixes, key=lambda prefix: -prefixes[prefix])[:most])
        candidates = [item for item in candidates if codes[item][: level + 1] in best]
    candidates.sort(key=lambda item: -sum(digits[item]))
    return [(item, sum(digits[item])) for item in candidates[:keep]]


def generate(
    decoder: SlateDecoder, context: Context, *, banned: set[int], width: int | None = None
) -> tuple[list[int], list[float]]:
    """A slate whose slots are filled greedily, and the log-probability of each item."""
    if isinstance(decoder, FlatItemDecoder):
        size = decoder.slate_size
        beam = None if width is None else max(width, size)
        found = next_items(decoder, context, [], banned=banned, width=beam, keep=size)
        return [item for item, _ in found], [score for _, score in found]
    slate: list[int] = []
    scores: list[float] = []
    for _ in range(decoder.slate_size):
        item, score = next_items(decoder, context, slate, banned=banned, width=width)[0]
        slate.append(item)
        scores.append(score)
    return slate, scores


def generate_flat(
    decoder: SlateDecoder, context: Context, *, banned: set[int], width: int
) -> tuple[list[int], float]:
    """The best slate of a beam search over all digits of all slots, and its log-probability."""
    beams: list[tuple[list[int], float]] = [([], 0.0)]
    levels = decoder.ids.num_decoded
    for _ in range(decoder.slate_size):
        options = []  # (slate with a next item, log-probability before it, digits of the item)
        for slate, score in beams:
            for item in range(decoder.ids.num_items):
                if item not in banned and item not in slate:
                    found = _log_probs(decoder, context, slate, item)
                    options.append(([*slate, item], score, found))
        for level in range(levels):
            prefixes = {}
            for slate, score, found in options:
                code = tuple(decoder.ids.codes[slate[-1], : level + 1].tolist())
                prefixes[(*slate[:-1], code)] = score + sum(found[: level + 1])
            best = set(sorted(prefixes, key=lambda prefix: -prefixes[prefix])[:width])
            options = [
                (slate, score, found)
                for slate, score, found in options
                if (*slate[:-1], tuple(decoder.ids.codes[slate[-1], : level + 1].tolist())) in best
            ]
        beams = [(slate, score + sum(found)) for slate, score, found in options]
    return max(beams, key=lambda beam: beam[1])


def _log_probs(decoder: SlateDecoder, context: Context, slate: list[int], item: int) -> list[float]:
    """log P of every digit of `item` behind `slate`, and of the item itself where it is scored.

    Later slots hold any item.
    """
    whole = [*slate, item] + [0] * (decoder.slate_size - len(slate) - 1)
    device = context.tokens.device
    found = decoder.log_probs(context, torch.tensor([whole], device=device))[0, len(slate)]
    return [float(value) for value in found]
