"""Figure 5: the item table before and after stage 1."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hpgr_plugin.components.mim import INIT_STD
from hpgr_plugin.errors import HpgrError
from hpgr_plugin.hosts.embedded.train.checkpoint import load_checkpoint
from hpgr_plugin.report.figure import MEASURED, Figure, Point
from hpgr_plugin.transfer.handoff import load_handoff, read_header

_BINS, _MOST_ITEMS = 40, 2000
_NORMS, _SPECTRUM = "L2 norms of items", "singular values"


def figure5(handoff: Path, before: Path | None = None, *, seed: int = 0) -> Figure:
    """Norms, singular values and a map of the item table before and after stage 1.

    Args:
        handoff: of stage 1: the table after.
        before: checkpoint of a ranker without stage 1, whose table is shown as the one before;
            None: the table as stage 1 draws it at its start.
        seed: of that draw, and of the map.
    """
    after = _handed_over(handoff)
    if before is None:
        random = np.random.default_rng(seed)
        first = random.normal(scale=INIT_STD, size=after.shape).astype(np.float32)
    else:
        first = _table_of(before)
    tables = {"before": first, "after": after}
    mapped, method = _map(tables, seed)
    points = [*_norms(tables), *_spectra(tables), *mapped]
    settings = {
        "after": str(handoff),
        "before": str(before or f"normal, standard deviation {INIT_STD}, seed {seed}"),
        "map": method,
        "paper": "d = 64; after: norms mostly .12 to .2, a second hump near .8, a tail to 2.7",
    }
    labels = {
        _NORMS: ("norm", "share of items"),
        _SPECTRUM: ("rank", "singular value / largest"),
    }
    return Figure("figure5", points, _draw, labels, settings)


def _handed_over(path: Path) -> np.ndarray:
    """The item table of a hand-over, float32 [V, D]."""
    header = read_header(path)
    sizes = {key: header[key] for key in ("num_items", "embedding_dim", "vocabulary_digest")}
    table: np.ndarray = load_handoff(path, **sizes).item_table.float().numpy()
    return table


def _table_of(checkpoint: Path) -> np.ndarray:
    """The item table of a ranker's best weights, float32 [V, D]."""
    weights = load_checkpoint(checkpoint, torch.device("cpu"))["best_model"]
    if "item_table.weight" not in weights:
        raise HpgrError(f"{checkpoint} has no item table")
    table: np.ndarray = weights["item_table.weight"].float().numpy()
    return table


def _norms(tables: dict[str, np.ndarray]) -> list[Point]:
    norms = {name: np.linalg.norm(table, axis=1) for name, table in tables.items()}
    edges = np.linspace(0, max(norm.max() for norm in norms.values()), _BINS + 1)
    points = []
    for name, norm in norms.items():
        share = np.histogram(norm, edges)[0] / len(norm)
        centres = (edges[:-1] + edges[1:]) / 2
        points += [_point(_NORMS, name, *pair) for pair in zip(centres, share, strict=True)]
    return points


def _spectra(tables: dict[str, np.ndarray]) -> list[Point]:
    points = []
    for name, table in tables.items():
        values = np.linalg.svd(table - table.mean(0), compute_uv=False)
        points += [_point(_SPECTRUM, name, i + 1, v / values[0]) for i, v in enumerate(values)]
    return points


def _map(tables: dict[str, np.ndarray], seed: int) -> tuple[list[Point], str]:
    """Two coordinates of some items, by UMAP where it is installed, else by PCA."""
    try:
        import umap
    except ModuleNotFoundError:
        method = "PCA (UMAP needs umap-learn, extra 'umap')"
    else:
        method = "UMAP"
    points = []
    for name, table in tables.items():
        chosen = np.random.default_rng(seed).permutation(len(table))[:_MOST_ITEMS]
        table = table[np.sort(chosen)]
        if method == "UMAP":
            places = umap.UMAP(n_components=2, random_state=seed).fit_transform(table)
        else:
            left, values, _ = np.linalg.svd(table - table.mean(0), full_matrices=False)
            places = left[:, :2] * values[:2]
        panel = f"{method.split()[0]}, {name} stage 1"
        points += [_point(panel, name, x, y) for x, y in places]
    return points, method


def _point(panel: str, series: str, x: float, y: float) -> Point:
    return Point(panel, MEASURED, series, float(x), float(y))


def _draw(axes: Any, points: Sequence[Point]) -> None:
    is_map = points[0].panel not in (_NORMS, _SPECTRUM)
    for name in dict.fromkeys(point.series for point in points):
        x = [point.x for point in points if point.series == name]
        y = [point.y for point in points if point.series == name]
        if is_map:
            axes.scatter(x, y, s=2, label=name)
        else:
            axes.plot(x, y, label=name)
    if points[0].panel == _SPECTRUM:
        axes.set_yscale("log")
    axes.legend(fontsize=7)
