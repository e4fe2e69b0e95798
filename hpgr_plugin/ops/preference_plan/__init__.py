"""Which history items a candidate keeps, and with what weight: the plan of PGSA (Eq. 5)."""

from torch import Tensor, no_grad

from hpgr_plugin.ops.dispatch import triton_operator
from hpgr_plugin.ops.preference_plan.plan import (
    PlanInputs,
    PlanSettings,
    PlanTimes,
    PreferencePlan,
    Selection,
    most_kept,
)

__all__ = [
    "PlanInputs",
    "PlanSettings",
    "PreferencePlan",
    "Selection",
    "count_earlier",
    "most_kept",
    "plan_preferences",
]

_OPERATOR = triton_operator(__name__)


@no_grad()
def plan_preferences(
    history_embeddings: Tensor,
    candidate_embeddings: Tensor,
    history_offsets: Tensor,
    candidate_offsets: Tensor,
    top_k: int = 50,
    sigma: float = 2.0,
    eps: float = 1e-3,
    recent: int = 0,
    history_timestamps: Tensor | None = None,
    candidate_timestamps: Tensor | None = None,
    *,
    max_history: int | None = None,
    max_candidates: int | None = None,
    backend: str | None = None,
) -> PreferencePlan:
    """Keep the items around each candidate's anchors, and drop the rest (Eq. 5).

    The anchors of candidate C are the `top_k` visible items with the largest score e_C . e_i; of
    equal scores the most recent wins. An item j has the weight M_j = exp(-d_j^2 / (2 sigma^2)),
    d_j being the distance to the nearest anchor in positions of the user's history; items with
    M_j < eps are dropped. The `recent` most recent visible items are kept with weight 1 and do not
    act as anchors. No gradient goes through the selection. The plan of a candidate depends only on
    its own user, not on the rest of the batch.

    Args:
        history_embeddings: `[T, D]`; half precision is scored in float32.
        candidate_embeddings: `[C, D]`.
        history_offsets: `[B + 1]`, histories of the users, oldest item first.
        candidate_offsets: `[B + 1]`, candidates of the same users.
        top_k: K, the number of anchors, at least 0.
        sigma: width of the Gaussian in positions, above 0.
        eps: smallest weight kept, in (0, 1].
        recent: number of most recent items kept, at least 0.
        history_timestamps: `[T]`, ascending in each history. With `candidate_timestamps`, an item
            with t_i >= t_C is hidden from C: neither anchor, nor recent, nor kept.
        candidate_timestamps: `[C]`, in the same unit.
        max_history: upper bound of the items of a user; with `max_candidates`, nothing is read from
            the device to check the offsets.
        max_candidates: upper bound of the candidates of a user.
        backend: "triton", "torch" or "naive"; None: the fastest that can.

    Returns:
        One row per candidate; weights are float64 where the history embeddings are float64, else
        float32.

    Raises:
        ValueError: an argument out of its range, or shapes that do not match.
    """
    settings = PlanSettings(top_k, sigma, eps, recent).check()
    inputs = PlanInputs(
        history_embeddings,
        candidate_embeddings,
        history_offsets,
        candidate_offsets,
        history_timestamps,
        candidate_timestamps,
        max_history=max_history,
        max_candidates=max_candidates,
    ).check()
    plan: PreferencePlan = _OPERATOR.run("plan_preferences", inputs, settings, backend=backend)
    return plan


@no_grad()
def count_earlier(
    history_timestamps: Tensor,
    history_offsets: Tensor,
    candidate_timestamps: Tensor,
    candidate_offsets: Tensor,
    *,
    max_history: int | None = None,
    max_candidates: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """How many items of its user's history lie before each candidate, `[C]` int64.

    The count of Eq. 4, `sum_i [t_i < t_C]`.

    Args:
        history_timestamps: `[T]`, ascending in each history.
        history_offsets: `[B + 1]`.
        candidate_timestamps: `[C]`, in the same unit.
        candidate_offsets: `[B + 1]`.
        max_history: upper bound of the items of a user; None: T.
        max_candidates: upper bound of the candidates of a user; None: C.
        backend: as in `plan_preferences`.
    """
    earlier: Tensor = _OPERATOR.run(
        "count_earlier",
        PlanTimes(
            history_timestamps,
            history_offsets,
            candidate_timestamps,
            candidate_offsets,
            len(history_timestamps) if max_history is None else max_history,
            len(candidate_timestamps) if max_candidates is None else max_candidates,
        ),
        backend=backend,
    )
    return earlier
