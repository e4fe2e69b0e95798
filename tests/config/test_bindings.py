"""Wrongly typed bindings and bindings that nothing reads stop before any work."""

from collections.abc import Iterator

import gin
import pytest

from hpgr_plugin.cli import load_configs
from hpgr_plugin.config.bindings import check_unused
from hpgr_plugin.config.registry import ConfigError

QUICKSTART = "configs/runs/quickstart.gin"


@pytest.fixture(autouse=True)
def _clear_gin() -> Iterator[None]:
    yield
    gin.clear_config()


@pytest.mark.parametrize(
    ("binding", "takes"),
    [
        ("hpgr.run.seeds = 'no'", "a list of items, each an integer, got 'no' (str)"),
        ("hpgr.run.rows = 'hstu'", "a list of items, each a string"),
        ("hpgr.HSTURanker.sem = 5", "@hpgr.SessionEnhancementModule() or None, got 5 (int)"),
        ("base/hpgr.HSTURanker.sem = 5", "@hpgr.SessionEnhancementModule() or None"),
        ("hpgr.HSTURanker.layer = 'mtgr'", "@hpgr.HSTULayer or @hpgr.MTGRLayer, got 'mtgr'"),
        ("hpgr.HSTURanker.layer = @hpgr.MTGRLayer()", "@hpgr.HSTULayer or @hpgr.MTGRLayer"),
        ("hpgr.HSTURanker.encoder = @hpgr.SASRec()", "@hpgr.BERT4Rec or @hpgr.DNN"),
        ("hpgr.HSTURanker.encoder = @hpgr.MTGRLayer", "@hpgr.BERT4Rec or @hpgr.DNN"),
        ("hpgr.HSTURanker.rare_items = @hpgr.DNN", "@hpgr.RareItems or None"),
        (
            "hpgr.HSTURanker.token_features = @hpgr.GapFeatures",
            "a list of items, each @hpgr.CrossFeatures or @hpgr.CalendarFeatures",
        ),
        ("hpgr.HSTURanker.token_features = [@hpgr.GapFeatures()]", "got [@hpgr.GapFeatures()]"),
        ("hpgr.HSTURanker.token_features = [@hpgr.GapFeatures, @hpgr.DNN]", "@hpgr.GapFeatures"),
        ("hpgr.TimeAwarePositionalEncoder.form = 'rotary'", "'absolute' or 'relative'"),
        ("hpgr.PreferenceGuidedSparseAttention.score = 'norm'", "'dot' or 'cosine'"),
        (
            "hpgr.HSTURanker.attention_hook = @hpgr.SessionEnhancementModule()",
            "@hpgr.PreferenceGuidedSparseAttention() or @hpgr.StochasticLength() or "
            "@hpgr.RandomItems() or None",
        ),
        ("hpgr.FinetuneSettings.epochs = 2.5", "an integer, got 2.5 (float)"),
        ("hpgr.FinetuneSettings.epochs = True", "an integer, got True (bool)"),
        ("hpgr.FinetuneSettings.learning_rate = 'x'", "a number"),
        ("hpgr.prepare_data.reader = 3", "@hpgr.MovieLensReader()"),
        ("hpgr.prepare_data.reader = @hpgr.MovieLensReader", "@hpgr.MovieLensReader()"),
        ("hpgr.prepare_data.label = @hpgr.MovieLensReader()", "@hpgr.rating_at_least()"),
        ("hpgr.SessionEnhancementModule.pooling = 'max'", "'cls' or 'mean', got 'max'"),
        ("hpgr.SessionEnhancementModule.causal = 'yes'", "True or False or None"),
        ("hpgr.RequestSettings.max_history = None", "an integer, got None"),
    ],
)
def test_a_wrong_type_names_the_binding_and_what_it_takes(binding: str, takes: str) -> None:
    name = binding.partition(" = ")[0]
    with pytest.raises(ConfigError) as caught:
        load_configs([QUICKSTART], [binding])
    assert str(caught.value).startswith(f"{name} takes ")
    assert takes in str(caught.value)


def test_a_wrong_type_behind_a_macro() -> None:
    with pytest.raises(ConfigError, match=r"takes an integer, got '64' \(str\)"):
        load_configs([QUICKSTART], ["EMBEDDING_DIM = '64'"])


@pytest.mark.parametrize(
    "binding",
    [
        "hpgr.FinetuneSettings.learning_rate = 1",
        "hpgr.run.seeds = (0, 1)",
        "hpgr.HSTURanker.sem = None",
        "hpgr.SessionEnhancementModule.causal = True",
        "hpgr.HSTURanker.token_features = [@hpgr.GapFeatures, @hpgr.CrossFeatures]",
    ],
)
def test_right_types_pass(binding: str) -> None:
    load_configs([QUICKSTART], [binding])
    check_unused()


@pytest.mark.parametrize("binding", ["hpgr.StochasticLength.alpha = 1.5", "EMBEDING_DIM = 32"])
def test_a_binding_that_nothing_reads_is_named(binding: str) -> None:
    load_configs([QUICKSTART], [binding])
    name = binding.partition(" = ")[0].removesuffix(".alpha")
    with pytest.raises(ConfigError, match=f"nothing reads the bindings of {name}:"):
        check_unused()
