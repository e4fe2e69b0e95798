"""Every shipped gin file is parsed, and what it describes is built."""

import importlib.util
import inspect
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gin
import pytest
import torch
from gin import config_parser

from hpgr_plugin.cli import load_configs
from hpgr_plugin.components.mim import MaskedItemModel
from hpgr_plugin.components.slates.semantic_ids import SemanticIds
from hpgr_plugin.components.slates.tokenizer import ItemTokenizer
from hpgr_plugin.config.bindings import check_unused
from hpgr_plugin.config.registry import ENCODER, GROUPS, SLOTS, build, load, register
from hpgr_plugin.config.scopes import check_scopes
from hpgr_plugin.data import build_requests
from hpgr_plugin.hosts.embedded.report.evaluation import Task
from hpgr_plugin.hosts.embedded.train.distributed import Process
from hpgr_plugin.hosts.embedded.train.stages import build_ranker, build_stage1

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
DATA, MODELS, RUNS, UPSTREAM = (
    sorted(str(path.relative_to(ROOT)) for path in (CONFIGS / folder).glob("*.gin"))
    for folder in ("data", "models", "runs", "upstream")
)
RIVALS = "configs/models/rivals.gin"
SLATES = "configs/models/slates.gin"
ENTRIES = {entry.name: entry for group in GROUPS.values() for entry in group}
# The configured data, replaced by a small log that needs no files.
SYNTHETIC = [
    "hpgr.prepare_data.reader = @hpgr.SyntheticReader()",
    "hpgr.prepare_data.label = @hpgr.label_column()",
    "hpgr.prepare_data.action = None",
    "hpgr.prepare_data.cache_dir = None",
    "hpgr.label_column.field = 'is_click'",
    "hpgr.SyntheticReader.num_users = 20",
    "hpgr.HSTURanker.pretrained = None",
]


@pytest.fixture(autouse=True)
def _clear_gin() -> Iterator[None]:
    gin.clear_config()
    yield
    gin.clear_config()


def bound(parameter: str) -> Any:
    """What gin makes of a bound `@reference()`."""
    return gin.query_parameter(parameter).scoped_configurable_fn()


def test_all_files_are_covered() -> None:
    known = {*DATA, *MODELS, *RUNS, *UPSTREAM}
    assert {str(path.relative_to(ROOT)) for path in CONFIGS.rglob("*.gin")} == known
    runs = "".join((ROOT / run).read_text() for run in RUNS)
    assert all(f"include '{model}'" in runs for model in MODELS)


@pytest.mark.parametrize("config", DATA)
def test_data_files_describe_data(config: str, tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    load_configs([config], [f"DATA_DIR = '{absent}'", "CACHE_DIR = None", "MAX_CANDIDATES = 2"])
    assert bound("hpgr.prepare_data.label").field
    assert bound("hpgr.prepare_data.split").test > 0
    if "synthetic" in config:
        data = build("prepare_data")
        assert data.log.num_users == 200
        requests = build_requests(data, "test", build("RequestSettings"))
        assert requests.candidate_count.max() == 2
    else:
        with pytest.raises(ValueError, match="no such file or folder"):
            build("prepare_data")


def titled_rows(config: str) -> list[str]:
    """The scopes of a file that are rows of a table."""
    return [line.scope for line in statements(config) if line.selector == "hpgr.AblationRow"]


def test_the_rivals_are_rows_of_any_run() -> None:
    rows = list(dict.fromkeys(titled_rows(RIVALS)))
    assert {"dnn", "moe", "gru4rec", "bert4rec", "sasrec", "wukong"} <= set(rows)
    bound_encoders = {line.value[1] for line in statements(RIVALS) if line.arg_name == ENCODER}
    assert bound_encoders == {e.name for e in GROUPS["embedded"] if e.slot == ENCODER}
    describe_models(["configs/runs/quickstart.gin", RIVALS], [f"hpgr.run.rows = {rows}"])


@pytest.mark.parametrize("config", RUNS)
def test_run_files_describe_models(config: str) -> None:
    features = ["hpgr.SyntheticReader.features = True"] if "features" in config else []
    describe_models([config], features)


@pytest.mark.parametrize("config", [run for run in RUNS if "study" in run])
def test_a_study_of_the_length_of_stage_1_has_two_lengths(config: str) -> None:
    load_configs([config], SYNTHETIC)
    rows = {"base_mim_long", "base_mim_short"} & set(gin.query_parameter("hpgr.run.rows"))
    assert rows
    for scope in rows:
        with gin.config_scope(scope):
            row = build("AblationRow")
        with gin.config_scope(row.stage1):
            assert build("PretrainSettings") != gin_default("PretrainSettings")


def gin_default(name: str) -> Any:
    """What is built outside of all scopes."""
    with gin.config_scope(None):
        return build(name)


def describe_models(configs: list[str], bindings: Sequence[str] = ()) -> None:
    """Every row of the configured run is built, and ranks a batch."""
    load_configs(configs, [*SYNTHETIC, *bindings])
    check_scopes()
    task = Task(build("prepare_data"), build("RequestSettings"), Process(0, 1, torch.device("cpu")))
    task = replace(task, statistics=True)
    batch = next(iter(task.loader("test").batches()))
    mode, rows = (gin.query_parameter(f"hpgr.run.{name}") for name in ("mode", "rows"))
    for scope in rows if mode == "ablation" else [""]:
        with gin.config_scope(scope or None):
            row = build("AblationRow") if scope else None
            build("FinetuneSettings")
            ranker = build_ranker(task).eval()
            assert torch.isfinite(ranker(batch)).all()
        with gin.config_scope(row.stage1 if row else None):
            build("PretrainSettings")
            stage1 = build_stage1(task.data)
        assert isinstance(stage1, MaskedItemModel)
        if row is None or row.stage1 is not None:
            assert stage1.item_table.weight.shape == ranker.item_table.weight.shape
            assert ranker.sem is None or stage1.sem is not None


@pytest.mark.parametrize("config", [run for run in RUNS if "slates" in run])
def test_slate_files_describe_slate_models(config: str) -> None:
    """Every row of `configs/models/slates.gin` is built with random tokens, and is trained on."""
    rows = [line.scope for line in statements(SLATES) if line.selector == "hpgr.SlateRow"]
    load_configs([config], [*SYNTHETIC, f"hpgr.run.rows = {list(dict.fromkeys(rows))}"])
    check_scopes()
    replaced = ["MovieLensReader", "KuaiRandReader", "rating_at_least"]  # by SYNTHETIC
    check_unused([*gin.query_parameter("hpgr.run.allow_unused"), *replaced])
    task = Task(build("prepare_data"), build("RequestSettings"), Process(0, 1, torch.device("cpu")))
    log, batch = task.data.log, next(iter(task.loader("test").batches()))
    digits = torch.randint(0, 8, (log.num_items, 3))
    for scope in gin.query_parameter("hpgr.run.rows"):
        with gin.config_scope(scope):
            row = build("SlateRow")
            build("AlignSettings" if row.start else "SlateSettings")
            model = build(
                "SlateModel",
                num_items=log.num_items,
                num_actions=log.num_actions,
                vocabulary_digest=log.item_vocabulary_digest,
                ids=None if row.tokenizer is None else SemanticIds(digits, codebook_size=8),
            )
        assert torch.isfinite(model(batch)[0])
        if row.tokenizer is not None:
            with gin.config_scope(row.tokenizer):
                assert build("TokenizeSettings").tokenizer(input_dim=4).codebook_size >= 64
    for scope in gin.query_parameter("hpgr.run.tokenizers"):
        with gin.config_scope(scope):
            assert issubclass(build("TokenizeSettings").tokenizer, ItemTokenizer)


def statements(config: str) -> list[config_parser.BindingStatement]:
    """The bindings of one file, without what it includes."""

    class Delegate(config_parser.ParserDelegate):
        def configurable_reference(self, name: str, evaluate: bool) -> tuple[str, str]:
            return "reference", name.rpartition("/")[2].removeprefix("hpgr.")

        def macro(self, name: str) -> tuple[str, str]:
            return "macro", name

    parsed = config_parser.ConfigParser((ROOT / config).read_text(), Delegate())
    return [line for line in parsed if isinstance(line, config_parser.BindingStatement)]


@pytest.mark.parametrize("config", UPSTREAM)
def test_upstream_files_name_what_exists(config: str) -> None:
    """Without the host: the names, and the components that fill the slots."""
    register("components")
    ours = [line for line in statements(config) if line.selector.startswith("hpgr.")]
    names = {line.selector.removeprefix("hpgr.") for line in ours}
    values = {line.value[1] for line in ours if line.arg_name in SLOTS and line.value is not None}
    assert names | values <= ENTRIES.keys()
    text = "\n".join(
        line
        for line in (ROOT / config).read_text().splitlines()
        if not line.startswith(("import ", "include "))
    )
    gin.parse_config(text.replace("%gin.REQUIRED", "None"), skip_unknown=True)
    for name in values:
        assert isinstance(build(name), load(ENTRIES[name].target))


@pytest.mark.skipif(
    importlib.util.find_spec("generative_recommenders") is None,
    reason="needs a generative-recommenders checkout on PYTHONPATH",
)
@pytest.mark.parametrize("config", [name for name in UPSTREAM if "synthetic" in name])
def test_upstream_files_parse_on_the_host(config: str) -> None:
    gin.parse_config_file(str(ROOT / config))


@pytest.mark.parametrize("config", [*DATA, "configs/models/hpgr_base.gin"])
def test_a_value_that_is_not_the_default_has_a_comment(config: str) -> None:
    """Values that a file sets for every run are the constructor's, or the line says why not."""
    lines = statements(config)
    macros = {line.selector: line for line in lines if not line.arg_name}
    for line in lines:
        if line.scope or not line.arg_name:
            continue
        signature = inspect.signature(load(ENTRIES[line.selector.removeprefix("hpgr.")].target))
        default = signature.parameters[line.arg_name].default
        value, comments = line.value, line.location.line_content
        if isinstance(value, tuple) and value[:1] == ("macro",):
            macro = macros.get(value[1])
            if macro is None:  # set by another file, which is checked too
                continue
            value, comments = macro.value, comments + macro.location.line_content
        if default in (inspect.Parameter.empty, None, "") and line.arg_name not in SLOTS:
            continue
        if isinstance(value, tuple) and value[:1] == ("reference",):
            value, default = value[1], getattr(default, "__name__", default)
        assert value == default or "#" in comments, (
            f"{config}: {line.selector}.{line.arg_name} = {value}, the default is {default}"
        )


def test_shipped_files_are_found_from_any_directory(tmp_path: Path) -> None:
    (tmp_path / "run.gin").write_text(
        "include 'configs/runs/quickstart.gin'\nDATA_DIR = 'nowhere'\n"
    )
    for file in ("run.gin", "configs/runs/quickstart.gin"):
        done = subprocess.run(
            [sys.executable, "-m", "hpgr_plugin.main", f"--gin_config_file={file}"],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert "no such file or folder" in done.stderr
