"""Requests to a `Scorer`: dense without a cache, dense with one, PGSA with one, in one run.

A request is a user whose history is known to the cache and C candidates shown at one time, from ids
to probabilities. "new event" has one more event than the history that is kept.
"""

import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from examples.benchmarks.registry import check, print_table
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


def run(*, quick: bool) -> None:
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    name = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}; D={WIDTH}, {LAYERS} layers, {HEADS} heads, float32")
    print(f"PGSA: K={TOP_K}, sigma={SIGMA:g}, recent={RECENT}, layout shared_history")
    lengths = [400, 4096] if quick or not cuda else [400, 4096, 16384]
    counts = [64, 1000] if quick or not cuda else [64, 1000, 10_000]
    seconds = 0.4 if cuda else 3.0
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
    dense = _scorer(length, None, device, cache_mib=0)
    cached = _scorer(length, None, device, cache_mib=1024)
    pgsa = _scorer(length, _pgsa(), device, cache_mib=1024)
    request, few = (_request(length - 1, c) for c in (count, min(count, 64)))
    for title, scorer, whole in (
        ("dense", cached, dense),
        ("PGSA", pgsa, _scorer(length, _pgsa(), device, cache_mib=0)),
    ):
        wanted = _score(whole, few)
        for _ in range(2):  # encoded, then found
            check(f"n={length} C={len(wanted)} {title}", _score(scorer, few), wanted, 1e-4)
    rows = []
    base = 0.0
    for title, scorer, new_event in (
        ("dense, no cache", dense, False),
        ("dense, cache", cached, False),
        ("PGSA, cache", pgsa, False),
        ("PGSA, cache, new event", pgsa, True),
    ):
        times = _times_ms(scorer, request, new_event=new_event, seconds=seconds)
        p50, p99 = statistics.median(times), float(np.percentile(times, 99))
        if title == "dense, cache":
            base = p50
        rows.append(
            {
                "n": length, "C": count, "model": title, "p50 ms": p50, "p99 ms": p99,
                "candidates/s": f"{1e3 * count / p50:,.0f}", "requests": len(times),
                "x dense, cache": base / p50 if base else "",
            }
        )  # fmt: skip
    return rows


def _pgsa() -> AttentionHook:
    return PreferenceGuidedSparseAttention(
        top_k=TOP_K, sigma=SIGMA, recent=RECENT, layout="shared_history"
    )


def _scorer(
    length: int, hook: AttentionHook | None, device: torch.device, *, cache_mib: int
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
    return Scorer(ServedModel(model, settings, vocabulary, {}), device=device, cache_mib=cache_mib)


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


def _times_ms(scorer: Scorer, request: Request, *, new_event: bool, seconds: float) -> list[float]:
    """Times of requests that follow each other, for about `seconds` and at least three."""
    longer = Request(
        **{
            **vars(request),
            "history_items": [*request.history_items, 0],
            "history_times": [*request.history_times, 365 * 24 * HOUR],
            "history_actions": [*(request.history_actions or ()), 0],
        }
    )
    prepare: Callable[[], object] = lambda: None  # noqa: E731
    if new_event:
        kept = None

        def prepare() -> None:
            nonlocal kept
            key = ("user", 1)
            kept = kept or scorer.cache.get(key)
            scorer.cache.put(key, kept)  # type: ignore[arg-type]

        scorer.score([request])
    asked = longer if new_event else request
    times: list[float] = []
    prepare()
    scorer.score([asked])
    while len(times) < 3 or (sum(times) < 1e3 * seconds and len(times) < 300):
        prepare()
        start = time.perf_counter()
        scorer.score([asked])
        times.append(1e3 * (time.perf_counter() - start))
    return times
