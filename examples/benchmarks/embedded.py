"""A training step of the embedded ranker: padded torch, and the kernels on jagged tokens.

MovieLens-1M shapes with random items: histories up to 400, 64 candidates over the last fifth of the
history's time, batches of at most 16,384 tokens; D = 128, 2 heads, 4 layers, bfloat16 autocast.
The batch's copy to the GPU, forward, backward, clipping and AdamW. The batch is planned before, as
on the loading thread of the trainer. Both backends run in one process on the same batch.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.benchmarks.registry import check, measure_ceilings, print_table
from examples.benchmarks.steps import StepCost, measure_step
from hpgr_plugin.components.attention_hooks import AttentionHook, PreferenceGuidedSparseAttention
from hpgr_plugin.data.batch import Batch
from hpgr_plugin.hosts.embedded.model.hstu import HSTULayer, SequenceLayer
from hpgr_plugin.hosts.embedded.model.mtgr import MTGRLayer
from hpgr_plugin.hosts.embedded.model.ranker import HSTURanker
from hpgr_plugin.hosts.embedded.train.planned import PlannedRequests, RequestPlanner
from hpgr_plugin.ops.dispatch import set_backends

NUM_ITEMS, NUM_ACTIONS = 3706, 5
MAX_HISTORY, CANDIDATES, BATCH_TOKENS = 400, 64, 16384
WIDTH, HEADS, LAYERS = 128, 2, 4
SECONDS = 3 * 365 * 86400

Hook = Callable[[], AttentionHook | None]
MODELS: dict[str, tuple[type[SequenceLayer], Hook]] = {
    "HSTU, dense": (HSTULayer, lambda: None),
    "MTGR, dense": (MTGRLayer, lambda: None),
    "PGSA K=50 sigma=2, shared history": (
        HSTULayer,
        lambda: PreferenceGuidedSparseAttention(top_k=50, sigma=2.0, layout="shared_history"),
    ),
    "PGSA K=8 sigma=1 recent=32, per candidate": (
        HSTULayer,
        lambda: PreferenceGuidedSparseAttention(top_k=8, sigma=1.0, recent=32),
    ),
}


def run(*, quick: bool) -> None:
    measure_ceilings()
    batch = make_batch()
    lengths = batch.history_offsets.diff()
    print(
        f"{len(lengths)} requests, {int(lengths.sum())} history items "
        f"(longest {int(lengths.max())}), {batch.num_candidates} candidates"
    )
    rows = []
    for name, (layer, hook) in MODELS.items():
        if quick and layer is MTGRLayer:
            continue
        _check(name, layer, hook, batch)
        base = None
        for backend in ("torch", "triton"):
            cost = _measure(layer, hook, batch, backend)
            base = base or cost.wall_ms
            rows.append(
                {"model": name, "backend": backend, "x torch": base / cost.wall_ms} | cost.columns()
            )
            torch.cuda.empty_cache()
    print_table(rows)


def make_batch() -> Batch:
    """Requests of 100 to 400 items until the batch is full."""
    rng = torch.Generator().manual_seed(0)

    def draw(low: int, high: int, size: int) -> Tensor:
        return torch.randint(low, high, (size,), generator=rng)

    histories: list[int] = []
    while True:
        length = int(draw(100, MAX_HISTORY + 1, 1))
        if sum(histories) + length + CANDIDATES * (len(histories) + 1) > BATCH_TOKENS:
            break
        histories.append(length)
    total, wanted = sum(histories), CANDIDATES * len(histories)
    return Batch(
        history_items=draw(0, NUM_ITEMS, total),
        history_timestamps=torch.cat([draw(0, SECONDS, n).sort().values for n in histories]),
        history_actions=draw(0, NUM_ACTIONS, total),
        history_offsets=torch.tensor([0, *histories]).cumsum(0),
        candidate_items=draw(0, NUM_ITEMS, wanted),
        candidate_timestamps=draw(SECONDS * 4 // 5, SECONDS, wanted),
        candidate_labels=draw(0, 2, wanted).float(),
        candidate_offsets=torch.arange(0, wanted + 1, CANDIDATES),
        users=torch.arange(len(histories)),
        user_features={},
    )


def build(layer: type[SequenceLayer], hook: Hook, *, dropout: float) -> HSTURanker:
    """The ranker with seeded weights, on CUDA."""
    torch.manual_seed(0)
    model = HSTURanker(
        num_items=NUM_ITEMS,
        num_actions=NUM_ACTIONS,
        vocabulary_digest="benchmark",
        embedding_dim=WIDTH,
        num_layers=LAYERS,
        num_heads=HEADS,
        layer=layer,
        max_history=MAX_HISTORY,
        dropout=dropout,
        attention_hook=hook(),
    )
    return model.to("cuda").train()


def _loss(model: nn.Module, planned: PlannedRequests) -> Tensor:
    with torch.autocast("cuda", dtype=torch.bfloat16):
        logits = planned.logits_of(model)[0]
    return F.binary_cross_entropy_with_logits(logits.float(), planned.batch.candidate_labels)


def _check(name: str, layer: type[SequenceLayer], hook: Hook, batch: Batch) -> None:
    """The kernels' logits are those of padded torch, so that no wrong result is timed."""
    model = build(layer, hook, dropout=0.0)
    batch = batch.to("cuda")
    logits = []
    for backend in ("triton", "torch"):
        set_backends({"hstu_attention": backend})
        with torch.no_grad():
            logits.append(model(batch))
    set_backends()
    check(name, logits[0], logits[1], 1e-3)


def _measure(layer: type[SequenceLayer], hook: Hook, batch: Batch, backend: str) -> StepCost:
    model = build(layer, hook, dropout=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    packed = RequestPlanner(model, torch.device("cuda")).plan(batch)

    def step() -> None:
        loss = _loss(model, packed.to(torch.device("cuda")))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    set_backends({"hstu_attention": backend})
    try:
        return measure_step(step)
    finally:
        set_backends()
