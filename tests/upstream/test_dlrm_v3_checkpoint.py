"""The host's checkpoints in models with slots: hook state, frozen tables, plain models."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gin
import pytest
import torch
from generative_recommenders.common import HammerKernel
from generative_recommenders.dlrm_v3.checkpoint import save_dmp_checkpoint
from generative_recommenders.dlrm_v3.train import utils as train
from generative_recommenders.modules.dlrm_hstu import DlrmHSTU as HostDlrmHSTU
from small_ranker import NUM_ITEMS, TABLE_DIM, batch, small_config, small_tables, write_handoff
from test_dlrm_v3_trainer import OPTIMIZERS

from hpgr_plugin.components.attention_hooks import PreferenceGuidedSparseAttention, StochasticLength
from hpgr_plugin.components.sem import SessionEnhancementModule
from hpgr_plugin.errors import HpgrError
from hpgr_plugin.hosts.dlrm_v3 import DlrmHSTU, attach
from hpgr_plugin.hosts.dlrm_v3.checkpoint import load_checkpoint
from hpgr_plugin.hosts.dlrm_v3.launch import topology_of

pytestmark = [pytest.mark.upstream, pytest.mark.usefixtures("gloo")]

CPU = torch.device("cpu")
DATA = batch([40, 30], [1, 2])


@pytest.fixture(autouse=True)
def _attached() -> None:
    attach()
    gin.parse_config(OPTIMIZERS)


def sharded(model_class: type = DlrmHSTU, **slots: Any) -> tuple[Any, Any, Any]:
    """The model, as the trainer shards it, and its optimizer."""
    torch.manual_seed(0)
    model = model_class(
        small_config(), small_tables(), is_inference=False, bf16_training=False, **slots
    )
    model.set_hammer_kernel(HammerKernel.PYTORCH)
    with topology_of(CPU):
        return model, *train.make_optimizer_and_shard(model, CPU, world_size=1)


def metrics() -> Any:
    empty: dict[str, list[Any]] = {"train": [], "eval": []}
    return SimpleNamespace(class_metrics=empty, regression_metrics=empty, global_step={})


def save(folder: Path, parallel: Any, optimizer: Any) -> None:
    save_dmp_checkpoint(parallel, optimizer, metrics(), rank=0, batch_idx=7, path=str(folder))
    gin.parse_config(f"load_dmp_checkpoint.path = '{folder}/7'")


def test_stochastic_length_goes_on_with_the_same_draws(tmp_path: Path) -> None:
    def hook() -> StochasticLength:
        return StochasticLength(alpha=1.3, selection="uniform")

    _, parallel, optimizer = sharded(attention_hook=hook())
    parallel(*DATA)
    save(tmp_path, parallel, optimizer)
    expected = [parallel(*DATA)[3] for _ in range(3)]
    _, again, its_optimizer = sharded(attention_hook=hook())
    load_checkpoint(again, its_optimizer, metrics(), CPU)
    for mine in expected:
        torch.testing.assert_close(again(*DATA)[3], mine, rtol=0, atol=0)


def test_a_frozen_table_is_restored_without_the_hand_over(tmp_path: Path) -> None:
    path = tmp_path / "stage1.safetensors"
    table = torch.randn(NUM_ITEMS, TABLE_DIM)
    write_handoff(path, table)
    hook = PreferenceGuidedSparseAttention(top_k=2, table="frozen")
    _, parallel, optimizer = sharded(attention_hook=hook, pretrained=str(path))
    save(tmp_path, parallel, optimizer)
    path.unlink()
    other = PreferenceGuidedSparseAttention(top_k=2, table="frozen")
    _, again, its_optimizer = sharded(attention_hook=other)
    load_checkpoint(again, its_optimizer, metrics(), CPU)
    restored = again.state_dict()["attention_hook.frozen_table"]
    torch.testing.assert_close(restored[:NUM_ITEMS], table, rtol=0, atol=0)
    torch.testing.assert_close(again(*DATA)[3], parallel(*DATA)[3], rtol=0, atol=0)


def few_kept(**arguments: Any) -> PreferenceGuidedSparseAttention:
    return PreferenceGuidedSparseAttention(top_k=2, sigma=1.0, **arguments)


def with_candidates(count: int) -> dict[str, Any]:
    return {"model_config": {"max_num_candidates": count}}


def test_the_layout_of_a_checkpoint_stays_whatever_would_be_chosen_now(tmp_path: Path) -> None:
    _, parallel, optimizer = sharded(attention_hook=few_kept(), **with_candidates(20))
    save(tmp_path, parallel, optimizer)
    model, again, its_optimizer = sharded(attention_hook=few_kept(), **with_candidates(1))
    assert model.attention_hook.layout == "per_candidate"
    load_checkpoint(again, its_optimizer, metrics(), CPU)
    assert model.attention_hook.layout == "shared_history"
    layers = model._hstu_transducer._stu_module._stu_layers
    assert {layer.layout for layer in layers} == {"shared_history"}
    torch.testing.assert_close(again(*DATA)[3], parallel(*DATA)[3], rtol=0, atol=0)


def test_a_checkpoint_from_before_there_was_a_choice_was_trained_per_candidate(
    tmp_path: Path,
) -> None:
    _, parallel, optimizer = sharded(attention_hook=few_kept(layout="per_candidate"))
    save(tmp_path, parallel, optimizer)
    model, again, its_optimizer = sharded(attention_hook=few_kept(), **with_candidates(20))
    assert model.attention_hook.layout == "shared_history"
    load_checkpoint(again, its_optimizer, metrics(), CPU)
    assert model.attention_hook.layout == "per_candidate"
    torch.testing.assert_close(again(*DATA)[3], parallel(*DATA)[3], rtol=0, atol=0)


def test_a_checkpoint_of_the_host_s_own_model_fills_all_but_the_slots(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    host, parallel, optimizer = sharded(HostDlrmHSTU)
    with torch.no_grad():
        for parameter in host.parameters():
            parameter.add_(0.01)
    save(tmp_path, parallel, optimizer)
    sem = SessionEnhancementModule(embedding_dim=TABLE_DIM, num_heads=2)
    _, mine, its_optimizer = sharded(sem=sem)
    with pytest.raises(HpgrError, match=r"of another model: it lacks .*sem\..*--fresh_slots"):
        load_checkpoint(mine, its_optimizer, metrics(), CPU)
    with caplog.at_level("INFO", logger="hpgr_plugin"):
        load_checkpoint(mine, its_optimizer, metrics(), CPU, fresh_slots=True)
    (said,) = [r.getMessage() for r in caplog.records if r.name.startswith("hpgr_plugin")]
    assert "sem.gate" in said
    assert "_stu_module" not in said
    # SEM's gate starts at zero, so the model is the host's.
    torch.testing.assert_close(mine(*DATA)[3], parallel(*DATA)[3], rtol=0, atol=1e-6)
