"""The export command: from a configured training to a folder, and its errors in one line."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import gin
import numpy as np
import pytest
from small_requests import requests_of

from hpgr_plugin.cli import run_configured
from hpgr_plugin.config.registry import build
from hpgr_plugin.metrics import ranking_metrics
from hpgr_plugin.serving import Scorer, export

RUN = """
include 'configs/data/synthetic.gin'
include 'configs/models/hpgr_base.gin'
include 'configs/models/hpgr_rows.gin'
NUM_USERS = 30
EMBEDDING_DIM = 16
MAX_HISTORY = 60
hpgr.RequestLoader.batch_tokens = 512
hpgr.SequenceLoader.batch_tokens = 512
hpgr.PretrainSettings.epochs = 1
hpgr.FinetuneSettings.epochs = 1
hpgr.run:
    mode = 'ablation'
    rows = ['hstu', 'base']
    seeds = [3]
    output_dir = '{folder}/out'
"""


@pytest.fixture
def config(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "run.gin"
    path.write_text(RUN.replace("{folder}", str(tmp_path)))
    gin.clear_config()
    yield path
    gin.clear_config()


def run_export(config: Path, *flags: str) -> None:
    gin.clear_config()
    export.main([f"--gin_config_file={config}", f"--out={config.parent / 'served'}", *flags])


def test_a_row_of_an_ablation_is_exported_and_scores_as_its_table_says(config: Path) -> None:
    run_configured(str(config), [])
    handoff = next(config.parent.rglob("handoff.safetensors"))
    handoff.unlink()  # it is not needed any more
    run_export(config, "--row=base")
    data, settings = build("prepare_data"), build("RequestSettings")
    scorer = Scorer.load(config.parent / "served", device="cpu")
    requests = requests_of(data, settings)
    scores = np.concatenate([answer.probabilities for answer in scorer.score(requests)])
    labels = np.concatenate([batch.candidate_labels.numpy() for batch in _in_order(data, settings)])
    auc = ranking_metrics(labels, scores, np.zeros(len(labels)))["auc"]
    table = json.loads((config.parent / "out" / "results.json").read_text())["metrics"]["rows"]
    (row,) = [line for line in table if line["scope"] == "base"]
    assert auc == pytest.approx(row["seeds"][0]["auc"], abs=1e-6)


def _in_order(data: object, settings: object) -> Iterator:
    loader = build("RequestLoader", prepared=data, split="test", settings=settings)
    for place in range(len(loader.requests)):
        yield loader.gather(np.array([place]))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], r"the run is an ablation: --row takes one of \['base', 'hstu'\]"),
        (["--row=bas"], r"--row takes one of \['base', 'hstu'\], got 'bas'"),
        (["--row=base"], "no checkpoint at .*base_seed3"),
        (["--row=base", "--gin_bindings=hpgr.run.rows = 3"], "hpgr.run.rows takes"),
    ],
)
def test_a_mistake_is_one_line(
    config: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run_export(config, *flags)
    assert stopped.value.code == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert "\n" not in error
    assert re.search(message, error)
    assert not (config.parent / "served").exists()
