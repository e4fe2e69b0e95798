"""The cost model behind `layout = "auto"` of preference-guided sparse attention.

A training step costs so much per row (projections, norms, everything that is done once per token)
and so much per pair of a query and a column (the attention). Per candidate, a user has
`C (m + 1)` rows in sequences of m kept items; with a shared history, `n + C` rows in one.
"""

from typing import Literal, NamedTuple

from hpgr_plugin.ops.preference_plan import PlanSettings, most_kept

ChosenLayout = Literal["per_candidate", "shared_history"]


class StepCost(NamedTuple):
    """Nanoseconds of a training step, forward and backward, per layer stack.

    Attributes:
        per_row: for every token.
        per_pair: for every pair of a query and a column that it sees.
    """

    per_row: float
    per_pair: float


# The dense rows of `python -m examples.benchmarks.registry stack` (131072 tokens, n = 1024 and
# 4096: 32.3 and 56.2 ms on an H100, 5 layers, D = 512) and of `... registry cpu` (one thread, 4
# layers, D = 64), solved for the two numbers.
STEP_COSTS = {"cuda": StepCost(185.0, 0.119), "cpu": StepCost(20_000.0, 250.0)}


class LayoutSizes(NamedTuple):
    """What is known of all batches before the first one.

    Attributes:
        max_history: n, items.
        max_candidates: C, of one user.
    """

    max_history: int
    max_candidates: int


class LayoutCosts(NamedTuple):
    """What a user of the largest size costs in one layout.

    Attributes:
        rows: tokens that the layers see: what the memory of a step grows with.
        nanoseconds: of a training step.
    """

    rows: int
    nanoseconds: float


def layout_costs(
    sizes: LayoutSizes, settings: PlanSettings, device_type: str
) -> dict[ChosenLayout, LayoutCosts]:
    """The costs of both layouts.

    Args:
        sizes: bounds of histories and candidates.
        settings: of the plan.
        device_type: "cuda" or "cpu"; others count as "cuda".
    """
    n, candidates = sizes
    length = most_kept(settings, n) + 1  # and the candidate
    cost = STEP_COSTS.get(device_type, STEP_COSTS["cuda"])

    def of(rows: int, pairs: float) -> LayoutCosts:
        return LayoutCosts(rows, rows * cost.per_row + pairs * cost.per_pair)

    return {
        "per_candidate": of(candidates * length, candidates * length * (length + 1) / 2),
        "shared_history": of(n + candidates, n * (n + 1) / 2 + candidates * (n + 1)),
    }


def choose_layout(costs: dict[ChosenLayout, LayoutCosts]) -> ChosenLayout:
    """Per candidate where that needs no more rows, and so no more memory, than the whole history.

    Then it needs less time too, on any device: as many rows in shorter sequences have fewer pairs.
    Where it needs more rows it may still be faster for long histories: bind the layout then.
    """
    shorter, shared = costs["per_candidate"], costs["shared_history"]
    return "per_candidate" if shorter.rows <= shared.rows else "shared_history"
