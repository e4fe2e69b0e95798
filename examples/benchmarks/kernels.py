"""Our attention against the host's on its Triton kernels, and the cost of column weights."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from examples.benchmarks import host
from examples.benchmarks.registry import (
    check,
    in_parallel,
    measure_ceilings,
    print_table,
    time_ms,
)
from hpgr_plugin.ops.hstu_attention import AttentionSpec, hstu_attention

HEADS, HEAD_DIM, TOKENS = 4, 128, 131072


def run(*, quick: bool) -> None:
    ceilings = measure_ceilings()
    in_parallel(check_form, FORMS)
    against_host = host.is_there()
    if against_host:
        host.stand_in()
        host.compile_in_parallel(12, ("dense", "described"))
    rows = []
    for length in (1024, 4096, 16384) if quick else (128, 512, 1024, 2048, 4096, 8192, 16384):
        offsets = torch.arange(0, TOKENS + 1, length, device="cuda")
        q, k, v = (_random(TOKENS).requires_grad_() for _ in range(3))
        weights = torch.rand(TOKENS, device="cuda")
        flops = 2 * 2 * TOKENS * length / 2 * HEADS * HEAD_DIM
        row: dict[str, object] = {"n": length}
        steps: dict[str, Callable[[], Tensor]] = {
            "ours": lambda o=offsets, n=length, x=(q, k, v): _ours(*x, o, n),
            "weighted": lambda o=offsets, n=length, x=(q, k, v), w=weights: _ours(*x, o, n, w),
        }
        if against_host:
            host.forget_attention()
            for how in (False, True):
                steps[f"host{' TMA' * how}"] = lambda o=offsets, n=length, x=(q, k, v), h=how: (
                    _host(*x, o, n, h)
                )
        times = {}
        grad = _random(TOKENS)
        for name, step in steps.items():
            output = step()
            backward = partial(torch.autograd.grad, output, (q, k, v), grad, retain_graph=True)
            with torch.no_grad():
                times[name] = time_ms(step), time_ms(backward)
        for which, share in ((0, 1.0), (1, 2.5)):
            kind = ("forward", "backward")[which]
            ours, weighted = times["ours"][which], times["weighted"][which]
            row[f"{kind} ms"] = ours
            row[f"{kind} TFLOP/s"] = flops * share / ours / 1e9
            bound_ms = ceilings.lower_bound_ms(num_bytes=0, flops=flops * share)
            row[f"{kind} / lower bound"] = ours / bound_ms
            row[f"weights {kind}"] = weighted / ours
            for name in ("host", "host TMA") if against_host else ():
                row[f"{name} / ours {kind}"] = times[name][which] / ours
        row["weights f+b"] = sum(times["weighted"]) / sum(times["ours"])
        rows.append(row)
    print_table(rows)


def _ours(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, n: int, weights: Tensor | None = None
) -> Tensor:
    spec = AttentionSpec(
        offsets=offsets, max_length=n, alpha=HEAD_DIM**-0.5, norm_length=n,
        column_weights=weights, exact=True,
    )  # fmt: skip
    return hstu_attention(q, k, v, spec)


def _host(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, n: int, descriptors: bool) -> Tensor:
    from generative_recommenders.common import HammerKernel
    from generative_recommenders.ops.hstu_attention import hstu_mha

    host.prepare_tuning()
    output: Tensor = hstu_mha(
        max_seq_len=n, alpha=HEAD_DIM**-0.5, q=q, k=k, v=v, seq_offsets=offsets,
        sort_by_length=True, kernel=HammerKernel.TRITON, enable_tma=descriptors,
    )  # fmt: skip
    return output


def _random(rows: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(rows, HEADS, HEAD_DIM, dtype=dtype, device="cuda")


FORMS = ("dense", "weighted", "weighted before SiLU", "targets", "last rows")


def check_form(name: str) -> None:
    """Check value and gradient of one form against plain torch in float64, in both dtypes."""
    torch.manual_seed(0)
    lengths = torch.tensor([0, 1, 700, 64, 129, 500], device="cuda")
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    total = int(offsets[-1])
    num_queries = total
    form: dict[str, Any] = {}
    if "weighted" in name:
        form["column_weights"] = torch.rand(total, device="cuda")
    if name == "weighted before SiLU":
        form["mask_position"] = "pre"
    if name == "targets":
        form["num_targets"] = torch.tensor([0, 1, 100, 1, 3, 16], device="cuda")
    if name == "last rows":
        form["column_weights"] = torch.rand(total, device="cuda")
        form["query_offsets"] = torch.tensor([0, 0, 1, 2, 3, 4, 5], device="cuda")
        form["max_query_length"], num_queries = 1, 5
    for dtype, tolerance in ((torch.bfloat16, 8e-3), (torch.float32, 1e-4)):
        inputs = [_random(n, dtype).requires_grad_() for n in (num_queries, total, total)]
        exact = [x.detach().double().requires_grad_() for x in inputs]
        spec = AttentionSpec(
            offsets=offsets, max_length=700, alpha=HEAD_DIM**-0.5, norm_length=700.0, **form
        )
        ours = hstu_attention(*inputs, spec, backend="triton")
        reference = hstu_attention(*exact, spec.replace(), backend="torch")
        grad = torch.randn_like(ours)
        pairs = zip(
            (ours, *torch.autograd.grad(ours, inputs, grad)),
            (reference, *torch.autograd.grad(reference, exact, grad.double())),
            strict=True,
        )
        for which, (got, wanted) in zip(("out", "dq", "dk", "dv"), pairs, strict=True):
            check(f"{name} {dtype} {which}", got, wanted, tolerance)
