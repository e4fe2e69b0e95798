"""PGSA's short path against the dense stack on a CPU, all in plain torch, at a small size."""

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.benchmarks.registry import check, print_table, time_ms
from hpgr_plugin.ops.compact.torch import compact_sequences, gather_tokens
from hpgr_plugin.ops.hstu_attention.torch import hstu_attention
from hpgr_plugin.ops.preference_plan import plan_preferences

WIDTH, LAYERS, HEADS = 64, 4, 4
SETTINGS = ((50, 2.0, 0), (32, 2.0, 0), (8, 1.0, 32))


def run(*, quick: bool) -> None:
    torch.set_num_threads(2)
    torch.manual_seed(0)
    rows: list[dict[str, object]] = []
    for length in (512,) if quick else (512, 1024, 2048):
        rows += _measure(length, users=4)
    print_table(rows)


def _measure(length: int, users: int) -> list[dict[str, object]]:
    layers = [
        {
            "uvqk": (0.1 * torch.randn(WIDTH, 4 * WIDTH)).requires_grad_(),
            "out": (0.1 * torch.randn(3 * WIDTH, WIDTH)).requires_grad_(),
        }
        for _ in range(LAYERS)
    ]
    parameters = [p for layer in layers for p in layer.values()]
    history_offsets = torch.arange(users + 1) * (length - 1)
    candidate_offsets = torch.arange(users + 1)
    raw, asked = torch.randn(users * (length - 1), WIDTH), torch.randn(users, WIDTH)
    history, candidates = (torch.randn_like(x).requires_grad_() for x in (raw, asked))
    grad = torch.randn(users, WIDTH)

    def stack(x: Tensor, offsets: Tensor, longest: int, weights: Tensor | None) -> Tensor:
        for place, layer in enumerate(layers):
            x = _layer(x, layer, offsets, longest, weights, float(length), last=place == LAYERS - 1)
        return x

    def dense(weights: Tensor | None = None) -> Tensor:
        x = torch.cat([history.view(users, -1, WIDTH), candidates[:, None]], 1).flatten(0, 1)
        return stack(x, torch.arange(users + 1) * length, length, weights)

    def both(step) -> float:  # type: ignore[no-untyped-def]
        inputs = [history, candidates, *parameters]
        return time_ms(lambda: torch.autograd.grad(step(), inputs, grad), budget_ms=2000)

    with torch.no_grad():
        dense_forward = time_ms(dense, budget_ms=1000)
    dense_both = both(dense)
    rows: list[dict[str, object]] = []
    for top_k, sigma, recent in SETTINGS:

        def short(top_k=top_k, sigma=sigma, recent=recent) -> Tensor:  # type: ignore[no-untyped-def]
            plan = plan_preferences(
                raw, asked, history_offsets, candidate_offsets, top_k, sigma, 1e-3, recent
            )
            compact = compact_sequences(plan, history_offsets, candidate_offsets)
            rows = gather_tokens(compact, plan, history, candidates)
            longest = int(compact.offsets.diff().max())
            return stack(rows, compact.offsets, longest, compact.column_weights)

        plan = plan_preferences(
            raw, asked, history_offsets, candidate_offsets, top_k, sigma, 1e-3, recent
        )
        mask = torch.zeros(users, length)
        user = plan.index // (length - 1)
        mask[user, plan.index - user * (length - 1)] = plan.weights
        mask[:, -1] = 1.0
        with torch.no_grad():
            check(f"n={length} K={top_k}", short(), dense(mask.flatten()), 1e-4)
            forward = time_ms(short, budget_ms=500)
        full = both(short)
        rows.append(
            {
                "n": length, "K sigma recent": f"{top_k} {sigma:g} {recent}",
                "kept": len(plan.index) // users + 1, "dense f ms": dense_forward,
                "dense f+b ms": dense_both, "f ms": forward, "f+b ms": full,
                "f x": dense_forward / forward, "f+b x": dense_both / full,
            }
        )  # fmt: skip
    return rows


def _layer(
    x: Tensor,
    layer: dict[str, Tensor],
    offsets: Tensor,
    longest: int,
    weights: Tensor | None,
    norm_length: float,
    *,
    last: bool,
) -> Tensor:
    """One HSTU layer; the last computes the candidates' rows alone, dense or not."""
    normed = F.layer_norm(x, x.shape[1:])
    u, v, q, k = (y.view(len(x), HEADS, -1) for y in (normed @ layer["uvqk"]).chunk(4, 1))
    query_offsets, max_query_length = None, None
    if last:
        rows = offsets[1:] - 1
        x, u, q = x[rows], u[rows], q[rows]
        query_offsets, max_query_length = torch.arange(len(offsets)), 1
    attended = hstu_attention(
        q, k, v, offsets, max_length=longest, alpha=(WIDTH // HEADS) ** -0.5,
        norm_length=norm_length, column_weights=weights, query_offsets=query_offsets,
        max_query_length=max_query_length,
    ).flatten(1)  # fmt: skip
    u = F.silu(u.flatten(1))
    gated = torch.cat([u, attended, u * F.layer_norm(attended, attended.shape[1:])], 1)
    return x + gated @ layer["out"]
