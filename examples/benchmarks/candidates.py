"""The layout "shared_history": 1, 10 and 64 candidates per dense history, n tokens in all."""

import torch

from examples.benchmarks import host
from examples.benchmarks.registry import check, measure_ceilings, print_table
from examples.benchmarks.stack import HEADS, LAYERS, WIDTH, new_stack, step_times
from hpgr_plugin.ops.preference_plan import PlanInputs, PlanSettings
from hpgr_plugin.ops.preference_plan.triton import weight_matrix

SETTINGS = PlanSettings(top_k=50, sigma=2.0)


def run(*, quick: bool) -> None:
    measure_ceilings()
    if host.is_there():
        host.stand_in()
    rows = []
    tokens = 131072 if quick else 1048576
    for length in (4096,) if quick else (1024, 4096, 16384):
        stack = new_stack(length)
        for count in (1, 10, 64):
            rows.append(_measure(stack, tokens // length, length - count, count))
            torch.cuda.empty_cache()
    print_table(rows)


def _measure(stack, users: int, length: int, count: int) -> dict[str, object]:  # type: ignore[no-untyped-def]
    places = torch.arange(users + 1, device="cuda")
    history_offsets, candidate_offsets = places * length, places * count
    raw, raw_candidates = (
        torch.randn(users * n, WIDTH, device="cuda").bfloat16() for n in (length, count)
    )
    history, candidates = (torch.randn_like(x).requires_grad_() for x in (raw, raw_candidates))
    grad = torch.randn_like(raw_candidates)
    inputs = PlanInputs(
        *tables, history_offsets, candidate_offsets, max_history=length, max_candidates=count
    )  # fmt: skip

    def sparse() -> torch.Tensor:
        matrix = weight_matrix(inputs, SETTINGS)
        return stack.shared_history(
            history, candidates, history_offsets, candidate_offsets, matrix, max_candidates=count
        )

    times = {"ours": step_times(sparse, [history, candidates, *stack.parameters()], grad)}
    row: dict[str, object] = {
        "tokens": users * (length + count), "n": length + count, "candidates": count,
        "layers": LAYERS, "heads": HEADS, "f ms": times["ours"][0], "f+b ms": times["ours"][1],
        "GiB": times["ours"][2],
    }  # fmt: skip
    if not host.is_there():
        return row
    dense = host.HostStack(stack)
    host.prepare_tuning()
    host.forget_attention()
    both = torch.cat(
        [history.detach().view(users, length, -1), candidates.detach().view(users, count, -1)], 1
    )
    whole = both.flatten(0, 1).requires_grad_()
    offsets, targets = places * (length + count), torch.full_like(places[1:], count)
    own = torch.arange(len(whole), device="cuda").view(users, -1)[:, length:].flatten()

    def full() -> torch.Tensor:
        output = dense.dense(whole, offsets, max_length=length + count, num_targets=targets)
        return output[own]

    with torch.no_grad():  # without a mask, ours equals the host's dense stack
        everything = torch.ones(users * count, length, device="cuda")
        ours = stack.shared_history(
            history, candidates, history_offsets, candidate_offsets, everything,
            max_candidates=count,
        )  # fmt: skip
        check(f"{count} candidates n={length}", ours - candidates, full() - candidates, 2e-2)
    forward, both_ways, _ = step_times(full, [whole, *dense.parameters()], grad)
    return row | {
        "host f ms": forward, "host f+b ms": both_ways, "f / host": times["ours"][0] / forward,
        "f+b / host": times["ours"][1] / both_ways,
    }  # fmt: skip
