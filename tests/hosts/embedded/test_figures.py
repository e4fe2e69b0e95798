"""Every figure from a finished run: a csv with its settings, and a png."""

import csv
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from hpgr_plugin.hosts.embedded.report.ablation import run_ablation
from hpgr_plugin.hosts.embedded.report.evaluation import Task
from hpgr_plugin.hosts.embedded.train.checkpoint import load_checkpoint
from hpgr_plugin.report.__main__ import FROM_RESULTS, main
from hpgr_plugin.report.paper import AUC, TOP_K
from hpgr_plugin.transfer.handoff import save_handoff

Rows = list[dict]


def row(scope: str, figure: str | None, auc: float, **changes: object) -> dict:
    seeds = [
        {
            "auc": value,
            "gauc": value - 0.1,
            "kept_tokens": auc / 2,
            "seconds_per_step": 0.2,
            "inference_seconds_per_step": 0.1,
        }
        for value in (auc - 0.01, auc + 0.01)
    ]
    settings = {"scope": scope, "title": f"the {scope}", "figure": figure, "series": "", "x": None}
    return {**settings, "seeds": seeds, **changes}


@pytest.fixture
def ablation(tmp_path: Path) -> Path:
    """A folder with results.json of rows for every figure."""
    rows = [
        row("item_mean", None, 0.5),
        row("hstu", None, 0.7),
        row("full", None, 0.8),
        row("figure6/k_30", "figure6", 0.6, series="PGSA", x=30),
        row("figure6/k_50", "figure6", 0.7, series="PGSA", x=50),
        row("figure7/history_50", "figure7_history", 0.6, series="full", x=50),
        row("figure7/wide/layers_2", "figure7_depth", 0.7, series="wide", x=2),
        row("figure7/narrow/layers_2", "figure7_depth", 0.65, series="narrow", x=2),
        row("tokens/pgsa/keep_16", "tokens", 0.7, series="PGSA"),
        row("tokens/last/keep_16", "tokens", 0.6, series="last"),
    ]
    content = {
        "metrics": {"rows": rows},
        "seeds": [0, 1],
        "environment": {"command": "python -m x", "device": "cpu", "versions": {"torch": "2"}},
        "operative_config": "hpgr.run.mode = 'ablation'\n",
    }
    (tmp_path / "results.json").write_text(json.dumps(content))
    return tmp_path


def read_csv(path: Path) -> tuple[dict[str, str], list[dict[str, str]]]:
    """Settings and rows of a csv."""
    lines = path.read_text().splitlines()
    comments = [line[2:].split(": ", 1) for line in lines if line.startswith("# ")]
    return dict(comments), list(csv.DictReader(x for x in lines if not x.startswith("# ")))


@pytest.mark.parametrize("figure", FROM_RESULTS)
def test_a_figure_is_a_csv_with_settings_and_a_png(
    ablation: Path, tmp_path: Path, figure: str
) -> None:
    out = tmp_path / "figures"
    assert main([figure, "--results", str(ablation), "--out", str(out)]) == 0
    settings, rows = read_csv(out / f"{figure}.csv")
    assert settings["command"] == "python -m x"
    assert settings["seeds"] == "[0, 1]"
    assert (out / f"{figure}.gin").read_text() == "hpgr.run.mode = 'ablation'\n"
    assert (out / f"{figure}.png").read_bytes()[:4] == b"\x89PNG"
    assert any(line["source"] == "measured" for line in rows)
    assert "item_mean" not in {line["series"] for line in rows}
    assert not list(out.glob("*.tmp"))


def test_points_are_means_over_seeds_beside_the_papers(ablation: Path, tmp_path: Path) -> None:
    for figure in ("figure4", "figure6", "tokens"):
        main([figure, "--results", str(ablation), "--out", str(tmp_path)])
    _, rows = read_csv(tmp_path / "figure6.csv")
    measured = {line["x"]: line for line in rows if line["source"] == "measured"}
    assert set(measured) == {"30", "50"}
    assert float(measured["30"]["y"]) == pytest.approx(0.6)
    assert float(measured["30"]["spread"]) == pytest.approx(np.std([0.59, 0.61], ddof=1))
    paper = {int(line["x"]): float(line["y"]) for line in rows if line["source"] == "paper"}
    assert paper == TOP_K
    _, rows = read_csv(tmp_path / "figure4.csv")
    assert {line["series"] for line in rows if line["source"] == "measured"} == {"hstu", "full"}
    paper = {line["series"]: float(line["y"]) for line in rows if line["source"] == "paper"}
    assert paper == AUC
    _, rows = read_csv(tmp_path / "tokens.csv")
    assert {(line["series"], float(line["x"])) for line in rows} == {("PGSA", 0.35), ("last", 0.3)}


@pytest.fixture
def handoff(tmp_path: Path) -> Path:
    path = tmp_path / "handoff.safetensors"
    table = torch.randn(60, 8) * torch.tensor([3.0, *[0.1] * 7])
    save_handoff(path, item_table=table, sem=None, vocabulary_digest="d", gap_seconds=9)
    return path


def test_figure5_shows_norms_spectrum_and_a_map(
    handoff: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)
    assert main(["figure5", "--handoff", str(handoff), "--out", str(tmp_path)]) == 0
    assert "PCA (UMAP needs umap-learn" in capsys.readouterr().out
    settings, rows = read_csv(tmp_path / "figure5.csv")
    assert settings["after"] == str(handoff)
    for series in ("before", "after"):
        own = [line for line in rows if line["series"] == series]
        shares = [float(line["y"]) for line in own if line["panel"] == "L2 norms of items"]
        assert sum(shares) == pytest.approx(1)
        values = [float(line["y"]) for line in own if line["panel"] == "singular values"]
        assert len(values) == 8
        # One direction carries the table after, none the one before.
        assert (values[1] > 0.5) == (series == "before")
        assert len([line for line in own if line["panel"] == f"PCA, {series} stage 1"]) == 60
    assert (tmp_path / "figure5.png").exists()


def test_figure5_takes_umap_where_it_is_installed(
    handoff: Path, tmp_path: Path, monkeypatch
) -> None:
    class Fake:
        def __init__(self, **_: object) -> None: ...

        def fit_transform(self, table: np.ndarray) -> np.ndarray:
            return table[:, :2]

    monkeypatch.setitem(sys.modules, "umap", types.SimpleNamespace(UMAP=Fake))
    main(["figure5", "--handoff", str(handoff), "--out", str(tmp_path)])
    settings, rows = read_csv(tmp_path / "figure5.csv")
    assert settings["map"] == "UMAP"
    assert len([line for line in rows if line["panel"] == "UMAP, after stage 1"]) == 60


def test_without_matplotlib_the_csv_is_written(
    ablation: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["figure6", "--results", str(ablation), "--out", str(tmp_path / "f")]) == 0
    assert "No png: matplotlib is not installed" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "f").iterdir()) == [
        "figure6.csv",
        "figure6.gin",
    ]


def changed(ablation: Path, change: Callable[[Rows], Rows]) -> None:
    content = json.loads((ablation / "results.json").read_text())
    content["metrics"]["rows"] = change(content["metrics"]["rows"])
    (ablation / "results.json").write_text(json.dumps(content))


def test_mistakes_end_in_one_line(ablation: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(*arguments: str) -> str:
        assert main(arguments) == 2
        text = capsys.readouterr().err
        assert text.count("\n") == 1
        return text

    assert "no /absent/results.json" in error("figure4", "--results", "/absent")
    assert "no hand-over at /absent" in error("figure5", "--handoff", "/absent")
    changed(ablation, lambda rows: rows[:3])
    found = error("figure6", "--results", str(ablation))
    assert "has no rows with hpgr.AblationRow.figure = 'figure6'" in found
    changed(ablation, lambda rows: [{**rows[1], "seeds": [{"auc": 0.5}]}])
    assert "'hstu' has no seconds_per_step" in error("figure8", "--results", str(ablation))
    (ablation / "results.json").write_text("{}")
    assert "is not of a finished ablation" in error("figure4", "--results", str(ablation))


def test_rows_of_figures_are_trained_and_drawn(
    configure: Callable[..., Task], tmp_path: Path
) -> None:
    """Scopes below a figure's scope share its bindings and bind their own point."""
    task = configure(
        "include 'configs/models/figure_rows.gin'",
        "NARROW_DIM = 8",
        "hpgr.FinetuneSettings.epochs = 1",
        "hpgr.PretrainSettings.epochs = 1",
    )
    rows = ["figure6/k_8", "figure7/history_50", "figure7/narrow/layers_2", "tokens/last/keep_8"]
    run_ablation(task, rows, seeds=[0], output_dir=tmp_path)
    for figure in ("figure6", "figure7", "tokens"):
        assert main([figure, "--results", str(tmp_path), "--out", str(tmp_path / "f")]) == 0
    _, points = read_csv(tmp_path / "f" / "figure6.csv")
    assert points[0]["x"] == "8"
    _, points = read_csv(tmp_path / "f" / "figure7.csv")
    assert [line["x"] for line in points if line["source"] == "measured"] == ["50", "2"]
    _, points = read_csv(tmp_path / "f" / "tokens.csv")
    assert 0 < float(points[0]["x"]) < 0.5
    path = tmp_path / "figure7" / "narrow" / "layers_2_seed0" / "checkpoint.pt"
    weights = load_checkpoint(path, torch.device("cpu"))["model"]
    assert weights["item_table.weight"].shape[1] == 8
