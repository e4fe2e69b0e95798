"""PGSA's short sequences against the dense stack on a CPU, all in plain torch, at small sizes."""

import torch
from torch import Tensor

from examples.benchmarks.registry import check, print_table, time_ms
from hpgr_plugin.components.hstu_stack import HSTUStack
from hpgr_plugin.ops.compact.parts import sequence_parts, short_sequences
from hpgr_plugin.ops.jagged import complete_cumsum
from hpgr_plugin.ops.preference_plan import PreferencePlan, plan_preferences

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
    stack = HSTUStack(
        embedding_dim=WIDTH, num_layers=LAYERS, num_heads=HEADS, head_dim=WIDTH // HEADS,
        norm_length=length,
    )  # fmt: skip
    places = torch.arange(users + 1)
    raw, raw_candidates = torch.randn(users * (length - 1), WIDTH), torch.randn(users, WIDTH)
    whole = torch.randn(users * length, WIDTH, requires_grad=True)
    offsets, grad = places * length, torch.randn(users, WIDTH)
    parts = sequence_parts(
        offsets, torch.ones_like(places[1:]), contextual_len=0, total_rows=len(whole)
    )

    def dense(weights: Tensor | None = None) -> Tensor:
        return stack(whole, weights, offsets, max_length=length, exact=True)

    def plan(setting: tuple[int, float, int]) -> PreferencePlan:
        top_k, sigma, recent = setting
        tensors = raw, raw_candidates, places * (length - 1), places
        return plan_preferences(*tensors, top_k, sigma, recent=recent)

    def short(setting: tuple[int, float, int]) -> Tensor:
        kept = short_sequences(parts, plan(setting), per_user=False)
        rows = whole.index_select(0, kept.index)
        ends = complete_cumsum(kept.lengths)
        return stack(rows, kept.weights, ends, max_length=kept.max_len, exact=True)

    def times(step) -> tuple[float, float]:  # type: ignore[no-untyped-def]
        inputs = [whole, *stack.parameters()]
        with torch.no_grad():
            forward = time_ms(step, budget_ms=1000)
        return forward, time_ms(lambda: torch.autograd.grad(step(), inputs, grad), budget_ms=2000)

    base = times(dense)
    rows: list[dict[str, object]] = []
    for setting in SETTINGS:
        kept = short_sequences(parts, plan(setting), per_user=False)
        mask = torch.zeros(len(whole)).index_copy(0, kept.index, kept.weights)
        with torch.no_grad():
            check(f"n={length} K={setting[0]}", short(setting), dense(mask), 1e-4)
        forward, both = times(lambda setting=setting: short(setting))
        rows.append(
            {
                "n": length, "K sigma recent": "{} {:g} {}".format(*setting),
                "kept": len(kept.index) // users, "dense f ms": base[0],
                "dense f+b ms": base[1], "f ms": forward, "f+b ms": both,
                "f x": base[0] / forward, "f+b x": base[1] / both,
            }
        )  # fmt: skip
    return rows
