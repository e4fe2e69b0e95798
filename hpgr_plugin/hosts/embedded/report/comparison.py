"""Every row of an ablation against the best rival: differences, with a paired bootstrap by user."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hpgr_plugin.hosts.embedded.report.bootstrap import METRICS, interval, resampled_metrics
from hpgr_plugin.hosts.embedded.report.predictions import Predictions
from hpgr_plugin.hosts.embedded.report.table import Row, mean_and_spread


def best_rival(rows: Sequence[Row]) -> str | None:
    """Scope of the rival with the highest mean test AUC; None where no row is a rival."""
    rivals = [row for row in rows if row.get("rival") and row["seeds"]]
    if not rivals:
        return None
    best = max(rivals, key=lambda row: mean_and_spread([seed["auc"] for seed in row["seeds"]])[0])
    return str(best["scope"])


def differences(
    predictions: Mapping[str, Sequence[Predictions]],
    reference: str,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """The difference of every row from the reference, metrics averaged over seeds first.

    Args:
        predictions: scope of a row -> its predictions, one set per seed.
        reference: scope of the row to compare with.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        scope -> "auc" and "gauc" -> "value", "low", "high" (the 95% interval), and "relative" with
        the same three as shares of the reference. Rows over other candidates are left out.
    """
    base = predictions[reference][0]
    rows = {
        scope: sets
        for scope, sets in predictions.items()
        if all(base.same_candidates(each) for each in sets)
    }
    every = [each for sets in rows.values() for each in sets]
    values = resampled_metrics(every, resamples=resamples, seed=seed)
    means, start = {}, 0
    for scope, sets in rows.items():
        means[scope] = values[:, start : start + len(sets)].mean(1)
        start += len(sets)
    return {
        scope: {
            name: _difference(mean[:, column], means[reference][:, column])
            for column, name in enumerate(METRICS)
        }
        for scope, mean in means.items()
        if scope != reference
    }


def _difference(values: np.ndarray, reference: np.ndarray) -> dict[str, Any]:
    absolute = interval(values - reference)._asdict()
    return absolute | {"relative": interval(values / reference - 1)._asdict()}


def summary(seeds: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation over the seeds of every metric that is a number."""
    found = {}
    for name in seeds[0] if seeds else ():
        values = [seed[name] for seed in seeds if isinstance(seed.get(name), int | float)]
        if len(values) == len(seeds):
            mean, spread = mean_and_spread(values)
            found[name] = {"mean": mean, "standard_deviation": spread}
    return found
