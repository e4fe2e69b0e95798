"""PGSA's selection against reading the history once, and against the product of the scores."""

from functools import partial

import torch

from examples.benchmarks.registry import measure_ceilings, print_table, time_ms
from hpgr_plugin.ops.preference_plan import PlanInputs, PlanSettings, plan_preferences
from hpgr_plugin.ops.preference_plan.triton import select

WIDTH = 512
SETTINGS = ((50, 2.0, 0), (32, 2.0, 0), (8, 1.0, 32))


def run(*, quick: bool) -> None:
    ceilings = measure_ceilings()
    _check()
    rows = []
    lengths = (1024, 4096, 16384) if quick else (512, 1024, 2048, 4096, 8192, 16384)
    for tokens in (131072, 1048576):
        history = torch.randn(tokens, WIDTH, device="cuda").bfloat16()
        for length in lengths:
            users = tokens // length
            history_offsets = torch.arange(0, tokens + 1, length, device="cuda")
            for candidates in (1, 64):
                candidate_offsets = torch.arange(users + 1, device="cuda") * candidates
                wanted = torch.randn(users * candidates, WIDTH, device="cuda").bfloat16()
                read_ms = 2e3 * history.numel() / ceilings.bytes_per_s
                product_ms = _product_ms(history.view(users, length, WIDTH), wanted)
                for top_k, sigma, recent in SETTINGS[1:] if quick else SETTINGS:
                    inputs = PlanInputs(
                        history, wanted, history_offsets, candidate_offsets,
                        max_history=length, max_candidates=candidates,
                    )  # fmt: skip
                    settings = PlanSettings(top_k, sigma, recent=recent)
                    step = partial(select, inputs, settings, with_candidates=True)
                    eager = time_ms(step)
                    replayed = time_ms(_captured(step))
                    rows.append(
                        {
                            "tokens": tokens, "n": length, "candidates": candidates,
                            "K sigma recent": f"{top_k} {sigma:g} {recent}",
                            "eager ms": eager, "graph ms": replayed,
                            "reading once ms": read_ms, "graph / reading": replayed / read_ms,
                            "product ms": product_ms, "graph / product": replayed / product_ms,
                        }
                    )  # fmt: skip
    print_table(rows)


def _product_ms(history: torch.Tensor, candidates: torch.Tensor) -> float:
    """The scores as the library's batched matrix product."""
    grouped = candidates.view(len(history), -1, candidates.shape[1]).transpose(1, 2)
    return time_ms(lambda: torch.bmm(history, grouped))


def _captured(step):  # type: ignore[no-untyped-def]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _check() -> None:
    """The same anchors, weights and ties as the torch plan, on whole numbers: scores are exact."""
    torch.manual_seed(0)
    for candidates in (1, 9):
        lengths = torch.tensor([0, 1, 40, 3000, 16384], device="cuda")
        history_offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        candidate_offsets = torch.arange(6, device="cuda") * candidates
        total = int(history_offsets[-1])
        history = torch.randint(-2, 3, (total, 64), device="cuda").bfloat16()
        candidate_rows = torch.randint(-2, 3, (5 * candidates, 64), device="cuda").bfloat16()
        times = torch.cat([torch.arange(int(n), device="cuda") for n in lengths])
        now = torch.randint(0, 17000, (5 * candidates,), device="cuda")
        tensors = (history, candidate_rows, history_offsets, candidate_offsets)
        for top_k, sigma, recent in SETTINGS:
            settings = (top_k, sigma, 1e-3, recent)
            got = plan_preferences(*tensors, *settings, times, now, backend="triton")
            wanted = plan_preferences(
                *(x.cpu() for x in tensors), *settings, times.cpu(), now.cpu(), backend="torch"
            )
            assert torch.equal(got.offsets.cpu(), wanted.offsets), (candidates, top_k, "offsets")
            assert torch.equal(got.index.cpu(), wanted.index), (candidates, top_k, "index")
            torch.testing.assert_close(got.weights.cpu(), wanted.weights, rtol=1e-6, atol=0)
    print("check plan: index, offsets and weights as in torch, ties included")
