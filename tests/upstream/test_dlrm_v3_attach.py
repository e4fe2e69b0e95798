"""Attach, detach, spawned workers, and what the host's own trainer code builds then."""

from pathlib import Path
from typing import Any

import gin
import pytest
import torch
from generative_recommenders.dlrm_v3.train import utils as train
from generative_recommenders.modules.dlrm_hstu import DlrmHSTU as HostDlrmHSTU
from small_ranker import TABLE_DIM, batch, build, step
from torch import multiprocessing

from hpgr_plugin.hosts import dlrm_v3
from hpgr_plugin.hosts.seams import host_has_seam

pytestmark = pytest.mark.upstream

NAMES = (
    "DlrmHSTU",
    "KeyedOptimizerWrapper",
    "DistributedModelParallel",
    "apply_optimizer_in_backward",
)
SMALL_MODEL = """
    import hpgr_plugin.hosts.dlrm_v3
    make_model.dataset = "debug"
    hpgr.DlrmHSTU.model_config = {
        "hstu_attn_num_layers": 1, "hstu_embedding_table_dim": 16,
        "hstu_transducer_embedding_dim": 16, "hstu_attn_linear_dim": 8, "hstu_attn_qk_dim": 8,
    }
    hpgr.DlrmHSTU.table_config = {
        "post_id": {"num_embeddings": 10, "embedding_dim": 16},
        "viewer_id": {"num_embeddings": 10, "embedding_dim": 16},
        "dummy_contexual": {"num_embeddings": 10, "embedding_dim": 16},
    }
"""


@pytest.fixture(autouse=True)
def _attached() -> Any:
    dlrm_v3.attach()
    yield
    gin.clear_config()
    dlrm_v3.attach()


def host_names() -> list[Any]:
    return [getattr(train, name) for name in NAMES]


def test_attach_is_idempotent_and_detach_undoes_it() -> None:
    attached = host_names()
    dlrm_v3.attach()
    assert host_names() == attached
    dlrm_v3.detach()
    originals = host_names()
    assert originals[0] is HostDlrmHSTU
    assert dlrm_v3.replaced_names() == []
    assert all("hpgr" not in name.__module__ for name in originals)
    assert dlrm_v3.replaced_names() == []
    dlrm_v3.detach()
    assert host_names() == originals
    dlrm_v3.attach()
    assert host_names() == attached


def test_replaced_names_are_these_and_no_others() -> None:
    model = [] if host_has_seam("model_cls") else NAMES[:1]
    rates = [] if host_has_seam("lr_scale") else NAMES[1:]
    harness = "generative_recommenders.dlrm_v3.inference"
    assert dlrm_v3.replaced_names() == [
        *(f"{train.__name__}.{name}" for name in (*model, *rates)),
        f"{harness}.inference_modules.DlrmHSTU",
        f"{harness}.model_family.ModelFamilyDenseDist",
    ]


def test_make_model_builds_the_slots_and_the_host_again_after_detach() -> None:
    gin.parse_config(SMALL_MODEL)
    dlrm_v3.attach()  # a patched host takes the class from gin, which the fixture has cleared
    gin.bind_parameter("hpgr.DlrmHSTU.attention_hook", None)
    model, config, tables = train.make_model()
    assert type(model) is dlrm_v3.DlrmHSTU
    # The data loaders get the very objects that were changed.
    assert config.hstu_attn_num_layers == 1
    assert tables["post_id"].num_embeddings == 10
    dlrm_v3.detach()
    assert type(train.make_model()[0]) is HostDlrmHSTU


def test_names_inside_the_host_are_its_own_after_building(monkeypatch: pytest.MonkeyPatch) -> None:
    from generative_recommenders.modules import dlrm_hstu as module

    from hpgr_plugin.components.attention_hooks import PreferenceGuidedSparseAttention

    before = (module.STULayer, module.HSTUTransducer)
    build(dlrm_v3.DlrmHSTU, attention_hook=PreferenceGuidedSparseAttention())
    with pytest.raises(ValueError, match="sem"):
        build(
            dlrm_v3.DlrmHSTU,
            attention_hook=PreferenceGuidedSparseAttention(),
            sem=torch.nn.Embedding(1, 3),
        )
    assert (module.STULayer, module.HSTUTransducer) == before
    # And a host model built next to ours has the host's parts.
    host = build(HostDlrmHSTU)
    assert type(host._hstu_transducer) is module.HSTUTransducer


def _in_a_worker(rank: int, config: str, folder: str) -> None:
    gin.parse_config(config)
    model, *_ = train.make_model()
    (Path(folder) / str(rank)).write_text(f"{type(model).__module__} {model.attention_hook}")


def test_spawned_workers_attach_through_their_gin_file(tmp_path: Path) -> None:
    config = (
        SMALL_MODEL
        + """
    hpgr.DlrmHSTU.attention_hook = @hpgr.PreferenceGuidedSparseAttention()
    hpgr.PreferenceGuidedSparseAttention.top_k = 7
    """
    )
    multiprocessing.start_processes(
        _in_a_worker, args=(config, str(tmp_path)), nprocs=2, start_method="spawn"
    )
    for rank in ("0", "1"):
        said = (tmp_path / rank).read_text()
        assert said.startswith("hpgr_plugin.hosts.dlrm_v3.model ")
        assert "top_k=7" in said


def test_an_unknown_slot_is_an_error_that_names_it() -> None:
    with pytest.raises(ValueError, match="attention_hok"):
        gin.parse_config(SMALL_MODEL + "    hpgr.DlrmHSTU.attention_hok = None\n")


def test_models_built_before_detach_go_on_working() -> None:
    from hpgr_plugin.components.attention_hooks import PreferenceGuidedSparseAttention

    model = build(dlrm_v3.DlrmHSTU, attention_hook=PreferenceGuidedSparseAttention(top_k=2))
    data = batch([5, 3], [1, 2])
    before = step(model, data)[0]
    dlrm_v3.detach()
    for mine, theirs in zip(before, step(model, data)[0], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    assert model._hstu_configs.hstu_embedding_table_dim == TABLE_DIM
