"""The rule behind `layout = "auto"` of preference-guided sparse attention.

A step costs so much per row (projections, norms, memory) and so much per pair of a query and a
column. As many rows in shorter sequences have fewer pairs, so counting rows is enough.
"""

from typing import Literal

from hpgr_plugin.ops.preference_plan import PlanSettings, most_kept

ChosenLayout = Literal["per_candidate", "shared_history"]


def layout_rows(
    max_history: int, max_candidates: int, settings: PlanSettings
) -> dict[ChosenLayout, int]:
    """The rows that the layers see of a user of the largest size, in both layouts.

    Args:
        max_history: n, items.
        max_candidates: C, of one user.
        settings: of the plan, which keeps m items: `C (m + 1)` rows per candidate, or `n + C`.
    """
    length = most_kept(settings, max_history) + 1  # and the candidate
    return {
        "per_candidate": max_candidates * length,
        "shared_history": max_history + max_candidates,
    }


def choose_layout(rows: dict[ChosenLayout, int]) -> ChosenLayout:
    """Per candidate where that needs no more rows than the whole history.

    Where it needs more rows it may still be faster for long histories: bind the layout then.
    """
    shorter = rows["per_candidate"] <= rows["shared_history"]
    return "per_candidate" if shorter else "shared_history"
