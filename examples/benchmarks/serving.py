"""Requests to a `Scorer`: dense without a cache, dense with one, PGSA with one, in one run.

A request is a user whose history is known to the cache and C candidates shown at one time, from ids
to probabilities. "named" has the version of the history in its place, "new event" one more event
than the history that is kept. On a GPU, "launches" is without CUDA graphs. "encode" is the part of
a request before it is scored, and "busy" the time in which the GPU runs its kernels.
"""

import statistics
import time
from collections.abc import Sequence

import numpy as np
import torch

from examples.benchmarks.registry import check, print_table
from examples.benchmarks.steps import profile_kernels
from hpgr_plugin.components.attention_hooks import AttentionHook, PreferenceGuidedSparseAttention
from hpgr_plugin.components.positions import TimeAwarePositionalEncoder
from hpgr_plugin.data.requests import RequestSettings
from hpgr_plugin.hosts.embedded.model.ranker import HSTURanker
from hpgr_plugin.ops.preference_plan.plan import gaussian_kernel
from hpgr_plugin.serving.folder import ServedModel
from hpgr_plugin.serving.requests import Request
from hpgr_plugin.serving.scorer import Scorer
from hpgr_plugin.serving.vocabulary import Vocabulary

WIDTH, LAYERS, HEADS, ITEMS, ACTIONS = 64, 4, 2, 100_000, 2
HOUR = 3600
TOP_K, SIGMA, RECENT = 8, 1.0, 32
_WARM_UP = 3  # requests: encoded, found, captured


def run(*, quick: bool) -> None:
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    name = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}; D={WIDTH}, {LAYERS} layers, {HEADS} heads, float32")
    print(f"PGSA: K={TOP_K}, sigma={SIGMA:g}, recent={RECENT}, layout shared_history")
    lengths = [400, 4096] if quick or not cuda else [400, 4096, 16384]
    counts = [64, 1000] if quick or not cuda else [64, 1000, 10_000]
    seconds = 0.4 if cuda else 1.5
    rows: list[dict[str, object]] = []
    for length in lengths:
        for count in counts:
            rows += _measure(length, count, device, seconds)
    print_table(rows)
    _print_work(lengths, counts)


def _print_work(lengths: Sequence[int], counts: Sequence[int]) -> None:
    """The multiplications and additions of a request whose history is kept, in GFLOP."""
    slots = TOP_K * (2 * (len(gaussian_kernel(SIGMA, 1e-3, max(lengths))) - 1) + 1) + RECENT
    rows: list[dict[str, object]] = []
    for length in lengths:
        for count in counts:
            pair = 2e-9 * count * WIDTH
            own = pair * 5 * WIDTH * LAYERS
            dense, kept = (2 * pair * LAYERS * each for each in (length, slots))
            rows.append(
                {
                    "n": length, "C": count, "layers' own": own, "dense attention": dense,
                    "PGSA attention": kept, "PGSA plan": pair * length,
                    "dense / PGSA": (own + dense) / (own + kept + pair * length),
                }
            )  # fmt: skip
    print_table(rows)


def _measure(
    length: int, count: int, device: torch.device, seconds: float
) -> list[dict[str, object]]:
    request, few = (_request(length - 1, c) for c in (count, min(count, 64)))
    scorers: dict[str, Scorer] = {}
    for title, hook in (("dense", None), ("PGSA", _pgsa())):
        whole = _scorer(length, hook, device, cache_mib=0)
        scorers[title] = cached = _scorer(length, hook, device, cache_mib=1024)
        wanted = _score(whole, few)
        for _ in range(3):  # encoded, found, and captured on a GPU
            check(f"n={length} C={len(wanted)} {title}", _score(cached, few), wanted, 1e-4)
        check(f"n={length} {title}, named", _score(cached, _named(cached, few)), wanted, 1e-4)
        if title == "dense":
            scorers["dense, no cache"] = whole
        if device.type == "cuda":
            launches = _scorer(length, hook, device, cache_mib=1024, capture=False)
            scorers[f"{title}, launches"] = launches
    rows = [
        _row("dense, no cache", scorers["dense, no cache"], request, seconds),
        _row("dense", scorers["dense"], request, seconds),
    ]
    base = rows[-1]["p50 ms"]
    for title, scorer in scorers.items():
        if title not in ("dense, no cache", "dense"):
            rows.append(_row(title, scorer, request, seconds))
        named = _named(scorer, request) if title in ("dense", "PGSA") else None
        if named is not None:
            rows.append(_row(f"{title}, named", scorer, named, seconds))
    rows.append(_row("PGSA, new event", scorers["PGSA"], request, seconds, new_event=True))
    return [
        {"n": length, "C": count, **row, "x dense": base / row["p50 ms"]}  # type: ignore[operator]
        for row in rows
    ]


def _row(
    title: str, scorer: Scorer, request: Request, seconds: float, *, new_event: bool = False
) -> dict[str, object]:
    """One line of the table."""
    times, encode = _times_ms(scorer, request, new_event=new_event, seconds=seconds)
    p50, p99 = statistics.median(times), float(np.percentile(times, 99))
    row: dict[str, object] = {
        "model": title, "p50 ms": p50, "p99 ms": p99, "encode ms": statistics.median(encode),
    }  # fmt: skip
    if scorer.device.type == "cuda":
        row["busy ms"] = "" if new_event else _busy_ms(scorer, request)
    count = len(request.candidates)
    return {**row, "candidates/s": f"{1e3 * count / p50:,.0f}", "requests": len(times)}


def _busy_ms(scorer: Scorer, request: Request) -> float:
    """The time in which kernels of one request run."""
    scorer.score([request])
    torch.cuda.synchronize()
    return profile_kernels(lambda: scorer.score([request]))[0]


def _named(scorer: Scorer, request: Request) -> Request:
    """The same request with the version of its history, which is kept from now on."""
    (answer,) = scorer.score([request])
    return Request(
        user_id=request.user_id,
        history_version=answer.history_version,
        candidates=request.candidates,
        times=request.times,
    )


def _pgsa() -> AttentionHook:
    return PreferenceGuidedSparseAttention(
        top_k=TOP_K, sigma=SIGMA, recent=RECENT, layout="shared_history"
    )


def _scorer(
    length: int,
    hook: AttentionHook | None,
    device: torch.device,
    *,
    cache_mib: int,
    capture: bool = True,
) -> Scorer:
    torch.manual_seed(0)
    model = HSTURanker(
        num_items=ITEMS,
        num_actions=ACTIONS,
        vocabulary_digest="",
        embedding_dim=WIDTH,
        num_layers=LAYERS,
        num_heads=HEADS,
        max_history=length,
        positional_encoder=TimeAwarePositionalEncoder(
            embedding_dim=WIDTH, max_positions=length + 1
        ),
        attention_hook=hook,
    ).eval()
    vocabulary = Vocabulary(
        item_ids=np.arange(ITEMS),
        action_values=np.arange(ACTIONS),
        num_actions=ACTIONS,
        user_ids=np.zeros(0, np.int64),
    )
    settings = RequestSettings(max_history=length)
    served = ServedModel(model, settings, vocabulary, {})
    return Scorer(served, device=device, cache_mib=cache_mib, capture=capture)


def _request(length: int, count: int) -> Request:
    draw = np.random.default_rng(0)
    times = np.sort(draw.integers(0, 365 * 24 * HOUR, length))
    return Request(
        user_id=1,
        history_items=draw.integers(0, ITEMS, length).tolist(),
        history_times=times.tolist(),
        history_actions=draw.integers(0, ACTIONS, length).tolist(),
        candidates=draw.integers(0, ITEMS, count).tolist(),
        times=366 * 24 * HOUR,
    )


def _score(scorer: Scorer, request: Request) -> torch.Tensor:
    (answer,) = scorer.score([request])
    return torch.from_numpy(answer.probabilities)


def _times_ms(
    scorer: Scorer, request: Request, *, new_event: bool, seconds: float
) -> tuple[list[float], list[float]]:
    """Times of requests that follow each other, for about `seconds` and at least three.

    Of whole requests, and of their encoding.
    """
    asked, kept = request, None
    if new_event:
        scorer.score([request])
        kept = scorer.cache.get(("user", 1))
        asked = Request(
            **{
                **vars(request),
                "history_items": [*(request.history_items or ()), 0],
                "history_times": [*(request.history_times or ()), 365 * 24 * HOUR],
                "history_actions": [*(request.history_actions or ()), 0],
            }
        )
    times: list[float] = []
    encode: list[float] = []
    while len(times) < 3 + _WARM_UP or (sum(times) < 1e3 * seconds and len(times) < 300):
        if kept is not None:
            scorer.cache.put(("user", 1), kept)
        start = time.perf_counter()
        encoded = scorer.encode(asked)
        encode.append(1e3 * (time.perf_counter() - start))
        scorer.score_encoded([encoded])
        times.append(1e3 * (time.perf_counter() - start))
    return times[_WARM_UP:], encode[_WARM_UP:]
