"""The whole step of a stack (select, gather, five layers, candidates) against the dense stack.

Every user has one candidate, the last of n tokens. Forward, and forward and backward to the
embeddings and all weights. "dense host" is the host's stack on its own Triton kernels, tuned by
its own autotuner; ratios are its time over the column's, so larger is faster.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from examples.benchmarks import host
from examples.benchmarks.registry import (
    Ceilings,
    check,
    measure_ceilings,
    print_table,
    time_ms,
)
from hpgr_plugin.components.hstu_stack import HSTUStack, graphed
from hpgr_plugin.ops.compact import KeptRows, compact
from hpgr_plugin.ops.preference_plan import PlanInputs, PlanSettings, Selection
from hpgr_plugin.ops.preference_plan.triton import select

WIDTH, LAYERS, HEADS, HEAD_DIM = 512, 5, 4, 128
SETTINGS = ((50, 2.0, 0), (32, 2.0, 0), (8, 1.0, 32))
GRAPH_ROWS = 2**17  # above, launches cost nothing beside the work and knowing the length pays


class Batch:
    """`tokens / n` users of n - 1 items and a candidate: raw table rows, and encoded ones."""

    def __init__(self, tokens: int, length: int) -> None:
        self.users, self.length = tokens // length, length
        count = self.users * (length - 1)
        self.raw = torch.randn(count, WIDTH, device="cuda").bfloat16()
        self.raw_candidates = torch.randn(self.users, WIDTH, device="cuda").bfloat16()
        self.history = torch.randn(count, WIDTH, device="cuda").bfloat16().requires_grad_()
        self.candidates = torch.randn_like(self.raw_candidates).requires_grad_()
        places = torch.arange(self.users + 1, device="cuda")
        self.history_offsets, self.candidate_offsets = places * (length - 1), places
        self.offsets, self.num_targets = places * length, torch.ones_like(places[1:])
        self.grad = torch.randn_like(self.raw_candidates)

    def whole(self) -> Tensor:
        """`[T, D]`: every user's history with the candidate at its end."""
        pair = self.history.detach().view(self.users, -1, WIDTH), self.candidates.detach()[:, None]
        return torch.cat(pair, 1).flatten(0, 1).requires_grad_()

    def select(self, setting: tuple[int, float, int]) -> Selection:
        top_k, sigma, recent = setting
        inputs = PlanInputs(
            self.raw, self.raw_candidates, self.history_offsets, self.candidate_offsets,
            max_history=self.length - 1, max_candidates=1,
        )  # fmt: skip
        settings = PlanSettings(top_k, sigma, recent=recent)
        return select(inputs, settings, with_candidates=True)

    def gather(self, chosen: Selection, num_rows: int) -> Tensor:
        """Rows of the short sequences, zero from their end on."""
        kept = KeptRows(chosen.index, chosen.offsets, num_rows, disjoint=True)
        return compact(self.history, self.candidates, kept)


def new_stack(length: int) -> HSTUStack:
    torch.manual_seed(0)
    stack = HSTUStack(
        embedding_dim=WIDTH, num_layers=LAYERS, num_heads=HEADS, head_dim=HEAD_DIM,
        norm_length=length,
    )  # fmt: skip
    return stack.to("cuda", torch.bfloat16)


def run(*, quick: bool) -> None:
    ceilings = measure_ceilings()
    if host.is_there():
        host.provide_torchrec_module()
        host.compile_in_parallel(12, ("dense",))
    lengths = (1024, 4096, 16384) if quick else (1024, 4096, 16384, 2048, 8192, 512)
    settings = SETTINGS[1:] if quick else SETTINGS
    rows = []
    for length in lengths:
        stack = new_stack(length)
        dense_host = host.HostStack(stack) if host.is_there() else None
        for tokens in (131072, 1048576):
            batch = Batch(tokens, length)
            if tokens == 131072:
                _check(stack, dense_host, batch)
            measured = _measure(stack, dense_host, batch, settings, ceilings)
            print_table(measured)
            rows += measured
            del batch
            torch.cuda.empty_cache()
    print("\nAll of them:")
    print_table(sorted(rows, key=lambda row: (row["n"], row["tokens"])))  # type: ignore[arg-type,return-value]


def step_times(
    forward: Callable[[], Tensor], inputs: list[Tensor], grad: Tensor
) -> tuple[float, float, float]:
    """Forward ms, forward and backward ms, peak GiB of the latter."""

    def both() -> object:
        return torch.autograd.grad(forward(), inputs, grad)

    torch.cuda.reset_peak_memory_stats()
    full = time_ms(both)
    peak = torch.cuda.max_memory_allocated() / 2**30
    with torch.no_grad():
        return time_ms(forward), full, peak


def pgsa_step(
    stack: HSTUStack, batch: Batch, setting: tuple[int, float, int]
) -> tuple[Callable[[], Tensor], str]:
    """Our fastest path for the size: captured for the most rows, or eager for the kept ones."""
    probe = batch.select(setting)
    room = len(probe.index)
    if room > GRAPH_ROWS:
        return lambda: stack.per_candidate(
            batch.history, batch.candidates, batch.select(setting), exact=True, disjoint=True
        ), "eager"
    run_captured = graphed(stack, room, batch.users, probe.max_length)

    def step() -> Tensor:
        chosen = batch.select(setting)
        rows = batch.gather(chosen, room)
        output: Tensor = run_captured(rows, chosen.weights, chosen.offsets)
        return output

    return step, "graph"


def row_of(
    batch: Batch,
    name: str,
    times: tuple[float, float, float],
    kept: int,
    work: dict[str, float],
    base: tuple[float, ...],
    ceilings: Ceilings,
) -> dict[str, object]:
    """One row of the table.

    Args:
        batch: what was timed on.
        name: of the stack.
        times: of `step_times`.
        kept: tokens in the stack.
        work: `flops` and `num_bytes` of a forward and backward.
        base: forward, and forward and backward, of what it is compared with.
        ceilings: of the device.
    """
    forward, full, peak = times
    bound_ms = ceilings.lower_bound_ms(**work)
    return {
        "tokens": batch.users * batch.length, "n": batch.length, "stack": name, "kept": kept,
        "f ms": forward, "f+b ms": full, "f x": base[0] / forward, "f+b x": base[1] / full,
        "TFLOP/s": work["flops"] / full / 1e9, "lower bound ms": bound_ms,
        "/ lower bound": full / bound_ms, "GiB": peak,
    }  # fmt: skip


def dense_work(batch: Batch) -> dict[str, float]:
    tokens = batch.users * batch.length
    flops = 3 * linear_flops(tokens, LAYERS) + 3.5 * attention_flops(tokens * batch.length, LAYERS)
    return {"flops": flops, "num_bytes": 4.0 * tokens * WIDTH}


def pgsa_work(batch: Batch, chosen: Selection) -> dict[str, float]:
    """Embeddings read, kept rows read, the gradient of all rows written; the kept rows' layers."""
    kept = int(chosen.offsets[-1])
    squares = float(chosen.offsets.diff().double().square().sum())
    flops = (
        3 * linear_flops(kept, LAYERS - 1)
        + 3.5 * attention_flops(squares, LAYERS - 1)
        + 3 * 2 * 2 * kept * WIDTH * HEADS * HEAD_DIM
    )
    return {"flops": flops, "num_bytes": 2.0 * WIDTH * (2 * batch.users * batch.length + kept)}


def name_of(setting: tuple[int, float, int]) -> str:
    return "K={} sigma={:g} recent={}".format(*setting)


def host_times(
    dense_host: "host.HostStack", batch: Batch, whole: Tensor
) -> tuple[float, float, float]:
    """The host's dense stack, tuned already."""
    last = batch.offsets[1:] - 1
    form = {"max_length": batch.length, "num_targets": batch.num_targets}
    return step_times(
        lambda: dense_host.dense(whole, batch.offsets, **form)[last],
        [whole, *dense_host.parameters()],
        batch.grad,
    )


def _measure(
    stack: HSTUStack,
    dense_host: "host.HostStack | None",
    batch: Batch,
    settings: tuple[tuple[int, float, int], ...],
    ceilings: Ceilings,
) -> list[dict[str, object]]:
    ours = [batch.history, batch.candidates, *stack.parameters()]
    tokens, last = batch.users * batch.length, batch.offsets[1:] - 1
    whole = batch.whole()
    timed = []
    if dense_host is not None:
        # The kernels are tuned at the smaller batch; the larger chooses among the best of those.
        host.prepare_tuning()
        host.forget_attention(keep=3 if tokens > 2**17 else None)
        times = host_times(dense_host, batch, whole)
        timed.append(("dense host", times, tokens, dense_work(batch)))
    times = step_times(
        lambda: stack.all_rows(whole, batch.offsets, max_length=batch.length)[last],
        [whole, *stack.parameters()], batch.grad,
    )  # fmt: skip
    timed.append(("dense ours", times, tokens, dense_work(batch)))
    for setting in settings:
        chosen = batch.select(setting)
        step, how = pgsa_step(stack, batch, setting)
        times = step_times(step, ours, batch.grad)
        kept, work = int(chosen.offsets[-1]), pgsa_work(batch, chosen)
        timed.append((f"{name_of(setting)}, {how}", times, kept, work))
    base = timed[0][1]
    return [row_of(batch, *row, base, ceilings) for row in timed]


def linear_flops(rows: float, layers: int) -> float:
    """Projections and output of a layer, forward."""
    hidden = HEADS * HEAD_DIM
    return 2.0 * rows * WIDTH * (4 * hidden + 3 * hidden) * layers


def attention_flops(squared_lengths: float, layers: int) -> float:
    """Two products over the causal half, forward."""
    return 2.0 * 2.0 * squared_lengths / 2 * HEADS * HEAD_DIM * layers


def _check(stack: HSTUStack, dense_host: "host.HostStack | None", batch: Batch) -> None:
    """Ours against the host, dense; and PGSA's short path against its mask on the full length."""
    whole = batch.whole().detach()
    last = batch.offsets[1:] - 1
    with torch.no_grad():
        dense = stack.all_rows(whole, batch.offsets, max_length=batch.length)
        if dense_host is not None:
            host.prepare_tuning()
            host.forget_attention()
            theirs = dense_host.dense(
                whole, batch.offsets, max_length=batch.length, num_targets=batch.num_targets
            )
            check(f"dense n={batch.length}", dense - whole, theirs - whole, 2e-2)
        for setting in SETTINGS:
            chosen = batch.select(setting)
            kept = int(chosen.offsets[-1])
            index = chosen.index[:kept]
            user = index.clamp(max=len(batch.history) - 1) // (batch.length - 1)
            item = index < len(batch.history)
            place = torch.where(item, index + user, last[(index - len(batch.history)).clamp(min=0)])
            mask = torch.zeros(len(whole), device="cuda")
            mask[place] = chosen.weights[:kept]
            full = stack(whole, mask, batch.offsets, max_length=batch.length, exact=True)
            step, how = pgsa_step(stack, batch, setting)
            with torch.enable_grad():  # captured forward and backward
                short = step().detach()
            start = batch.candidates.detach()
            check(f"PGSA {setting} n={batch.length} ({how})", short - start, full - start, 2e-2)
