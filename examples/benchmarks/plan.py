"""PGSA's selection alone, against reading the history once and against the scores' product."""

import torch

from examples.benchmarks.registry import measure_ceilings, print_table, time_ms
from hpgr_plugin.ops.preference_plan import plan_preferences
from hpgr_plugin.ops.preference_plan import triton as plan

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
                asked = torch.randn(users * candidates, WIDTH, device="cuda").bfloat16()
                read_ms = 2e3 * history.numel() / ceilings.bytes_per_s
                product_ms = _product_ms(history.view(users, length, WIDTH), asked)
                for top_k, sigma, recent in SETTINGS[1:] if quick else SETTINGS:
                    arguments = (history, asked, history_offsets, candidate_offsets)
                    settings = {"top_k": top_k, "sigma": sigma, "eps": 1e-3, "recent": recent}
                    bounds = {"max_history": length, "max_candidates": candidates}
                    step = lambda a=arguments, s=settings | bounds: plan.select(  # noqa: E731
                        *a, **s, with_candidates=True
                    )
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


def _product_ms(history: torch.Tensor, asked: torch.Tensor) -> float:
    """The scores as the library's batched matrix product, written as float32 would be."""
    grouped = asked.view(len(history), -1, asked.shape[1]).transpose(1, 2)
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
        asked = torch.randint(-2, 3, (5 * candidates, 64), device="cuda").bfloat16()
        times = torch.cat([torch.arange(int(n), device="cuda") for n in lengths])
        now = torch.randint(0, 17000, (5 * candidates,), device="cuda")
        for top_k, sigma, recent in SETTINGS:
            arguments = (history, asked, history_offsets, candidate_offsets)
            settings = {"top_k": top_k, "sigma": sigma, "recent": recent}
            settings |= {"history_timestamps": times, "candidate_timestamps": now}
            # On the CPU: of CUDA tensors the kernels would be compared with themselves.
            wanted = plan_preferences(
                *(x.cpu() for x in arguments),
                **{k: x.cpu() if isinstance(x, torch.Tensor) else x for k, x in settings.items()},
            )
            got = plan.plan_preferences(
                *arguments, **settings, max_history=16384, max_candidates=candidates
            )
            assert torch.equal(got.offsets.cpu(), wanted.offsets), (candidates, top_k, "offsets")
            assert torch.equal(got.index.cpu(), wanted.index), (candidates, top_k, "index")
            torch.testing.assert_close(got.weights.cpu(), wanted.weights, rtol=1e-6, atol=0)
    print("check plan: index, offsets and weights as in torch, ties included")
