"""The registry, and the checks of scopes."""

import ast
import pickle
from collections.abc import Iterator
from pathlib import Path

import gin
import pytest

from hpgr_plugin.components.sem import SessionEnhancementModule
from hpgr_plugin.config import registry
from hpgr_plugin.config.registry import (
    GROUPS,
    ConfigError,
    Entry,
    build,
    configured,
    load,
    register,
    register_entry,
)
from hpgr_plugin.config.scopes import check_scopes
from hpgr_plugin.data import LastFractionSplit, RequestSettings
from hpgr_plugin.errors import HpgrError

PACKAGE = Path(registry.__file__).parents[1]
# Adapters of hosts parse, query and bind the parameters of the host.
MAY_IMPORT_GIN = (
    "cli.py",
    "config/",
    "hosts/dlrm_v3/",
    "hosts/research/",
    "hosts/launch.py",
    "hosts/seams.py",
)
HERE = ("components", "data", "embedded")


@pytest.fixture(autouse=True)
def _gin() -> Iterator[None]:
    register(*HERE)
    yield
    gin.clear_config()


@pytest.mark.parametrize("group", HERE)
def test_every_target_exists_under_its_own_name(group: str) -> None:
    for entry in GROUPS[group]:
        assert load(entry.target).__name__ == entry.name
        assert configured(entry.name).__name__ == entry.name


def test_only_the_configuration_imports_gin() -> None:
    for file in PACKAGE.rglob("*.py"):
        name = file.relative_to(PACKAGE).as_posix()
        imports = [
            module
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for module in (
                [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else [alias.name for alias in node.names]
            )
        ]
        if not name.startswith(MAY_IMPORT_GIN):
            assert "gin" not in imports, f"{name} imports gin"


def test_gin_makes_instances_of_the_class_itself() -> None:
    gin.parse_config("""
        hpgr.SessionEnhancementModule.embedding_dim = 8
        hpgr.LastFractionSplit.test = 0.3
    """)
    sem, split = build("SessionEnhancementModule"), build("LastFractionSplit")
    assert type(sem) is SessionEnhancementModule
    assert sem.embedding_dim == 8
    assert type(split) is LastFractionSplit
    assert pickle.loads(pickle.dumps(split)) == LastFractionSplit(test=0.3)
    assert LastFractionSplit() == LastFractionSplit(test=0.1)


def test_components_take_bound_components() -> None:
    gin.parse_config("""
        hpgr.MaskedItemModel:
            embedding_dim = 8
            sem = @hpgr.SessionEnhancementModule()
        hpgr.SessionEnhancementModule:
            embedding_dim = 8
            gap_seconds = 60
        hpgr.PreferenceGuidedSparseAttention.top_k = 7
        hpgr.StochasticLength.alpha = 1.7
    """)
    assert build("MaskedItemModel", num_items=20).gap_seconds == 60
    assert build("PreferenceGuidedSparseAttention").settings.top_k == 7
    assert build("StochasticLength").alpha == 1.7


def test_arguments_have_precedence_and_scopes_apply() -> None:
    gin.parse_config("""
        hpgr.RequestSettings.max_history = 7
        row/hpgr.RequestSettings.max_history = 8
    """)
    assert build("RequestSettings", max_candidates=3) == RequestSettings(
        max_history=7, max_candidates=3
    )
    assert build("RequestSettings", max_history=9).max_history == 9
    with gin.config_scope("row"):
        assert build("RequestSettings").max_history == 8


@pytest.mark.parametrize(
    ("binding", "words"),
    [
        ("hpgr.RequestSettings.max_history = 0", "max_history"),
        ("hpgr.RequestSettings.history = 'all'", "history .*'all'"),
    ],
)
def test_a_value_out_of_range_is_a_config_error(binding: str, words: str) -> None:
    gin.parse_config(binding)
    with pytest.raises(HpgrError, match=words):
        build("RequestSettings")


def test_a_missing_argument_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="embedding_dim"):
        build("SessionEnhancementModule")


@pytest.mark.parametrize(
    "binding",
    ["hpgr.Nothing.size = 1", "hpgr.RequestSettings.size = 1", "hpgr.HSTURanker.num_items = 3"],
    ids=["unknown-name", "unknown-parameter", "denied-parameter"],
)
def test_an_unknown_binding_is_an_error(binding: str) -> None:
    with pytest.raises(ValueError, match=r"No configurable|doesn't have|denylisted"):
        gin.parse_config(binding)


def test_registration_refuses_duplicates_and_unknown_names() -> None:
    with pytest.raises(ConfigError, match=r"hpgr\.RequestLoader is registered twice: .*, other"):
        register_entry(Entry("other:RequestLoader"))
    with pytest.raises(ConfigError, match=r"module hpgr_plugin\.files has no 'Nothing'"):
        register_entry(Entry("hpgr_plugin.files:Nothing"))
    with pytest.raises(ConfigError, match=r"group must be one of .*, got 'host'"):
        register("host")
    with pytest.raises(ConfigError, match=r"hpgr\.Nothing is not registered"):
        configured("Nothing")


ROWS = """
    mim/hpgr.MaskedItemModel.sem = None
    base/hpgr.AblationRow:
        title = 'base'
        stage1 = 'mim'
    base/hpgr.HSTURanker.attention_hook = @recency/hpgr.PreferenceGuidedSparseAttention()
    recency/hpgr.PreferenceGuidedSparseAttention.recent = 32
"""


@pytest.mark.parametrize(
    ("binding", "words"),
    [
        ("", None),
        ("deep/er/hpgr.AblationRow.title = 'x'\ndeep/hpgr.HSTURanker.dropout = 0.5", None),
        (
            "other/hpgr.TokenizeSettings.tokenizer = @hpgr.RQVAE",
            None,
        ),
        ("typo/hpgr.HSTURanker.layer = 'mtgr'", "nothing enters the gin scope 'typo'"),
        ("base/hpgr.AblationRow.stage1 = 'min'", "'min' is entered and has no bindings"),
        (
            "base/hpgr.HSTURanker.sem = @recensy/hpgr.SessionEnhancementModule()",
            "'recensy' is entered and has no bindings",
        ),
        (
            "base/hpgr.set_backends.choices = {'a': @typo/hpgr.SyntheticReader()}",
            "'typo' is entered and has no bindings",
        ),
    ],
    ids=[
        "right",
        "nested",
        "tokenizer-left-out",
        "unused-scope",
        "stage-1-typo",
        "reference-typo",
        "inside-a-dict",
    ],
)
def test_scopes(binding: str, words: str | None) -> None:
    gin.parse_config(ROWS)
    gin.parse_config(binding)
    if words is None:
        check_scopes()
    else:
        with pytest.raises(ConfigError, match=words):
            check_scopes()
