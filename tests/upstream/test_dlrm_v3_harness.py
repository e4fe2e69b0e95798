"""What the host's inference harness builds and predicts, in this process and in its workers."""

import os
from collections.abc import Iterator
from typing import Any

import gin
import pytest
import torch
from generative_recommenders.common import HammerKernel
from generative_recommenders.dlrm_v3.inference import inference_modules, model_family
from generative_recommenders.modules.dlrm_hstu import DlrmHSTU as HostDlrmHSTU
from small_ranker import TABLE_DIM, WIDTH, batch, small_config, small_tables

from hpgr_plugin.components.attention_hooks import PreferenceGuidedSparseAttention
from hpgr_plugin.hosts import dlrm_v3

_PACKAGE = "generative_recommenders.dlrm_v3.inference"
_OLDER = "this host's harness does not script the dense part"
dense_predict_module = pytest.importorskip(f"{_PACKAGE}.dense_predict_module", reason=_OLDER)
ts_types = pytest.importorskip(f"{_PACKAGE}.ts_types", reason=_OLDER)

pytestmark = pytest.mark.upstream

SLOTS = f"""
import hpgr_plugin.hosts.dlrm_v3
hpgr.DlrmHSTU:
    sem = @hpgr.SessionEnhancementModule()
    positional_encoder = @hpgr.TimeAwarePositionalEncoder()
    attention_hook = @hpgr.PreferenceGuidedSparseAttention()
hpgr.SessionEnhancementModule.embedding_dim = {TABLE_DIM}
hpgr.SessionEnhancementModule.num_heads = 2
hpgr.TimeAwarePositionalEncoder.embedding_dim = {WIDTH}
hpgr.TimeAwarePositionalEncoder.max_positions = 129
hpgr.PreferenceGuidedSparseAttention.top_k = 3
"""
LENGTHS, CANDIDATES = [7, 1, 0, 12], [2, 1, 3, 2]


@pytest.fixture(autouse=True)
def _attached() -> Iterator[None]:
    dlrm_v3.attach()
    yield
    gin.clear_config()
    dlrm_v3.attach()


def get_hstu_model(**arguments: Any) -> Any:
    """The harness's own function, with the same weights each time, on the PyTorch kernels."""
    torch.manual_seed(0)
    model = inference_modules.get_hstu_model(small_tables(), small_config(), **arguments)
    model.set_hammer_kernel(HammerKernel.PYTORCH)
    return model


def test_the_harness_builds_the_slots_and_the_host_again_after_detach() -> None:
    gin.parse_config(SLOTS)
    for is_dense in (False, True):
        model = get_hstu_model(table_device="cpu", is_dense=is_dense)
        assert type(model) is dlrm_v3.DlrmHSTU
        assert isinstance(model.attention_hook, PreferenceGuidedSparseAttention)
        assert model.sem is not None
        assert model.is_inference
        assert not model.training
    dlrm_v3.detach()
    assert type(get_hstu_model()) is HostDlrmHSTU
    assert model_family.ModelFamilyDenseDist.__module__ == model_family.__name__


@torch.no_grad()
def test_empty_slots_predict_what_the_host_predicts() -> None:
    attached = get_hstu_model(table_device="cpu")
    dlrm_v3.detach()
    host = get_hstu_model(table_device="cpu")
    assert type(host) is HostDlrmHSTU
    attached.load_state_dict(host.state_dict())
    data = batch(LENGTHS, CANDIDATES)
    assert torch.equal(attached(*data)[3], host(*data)[3])


@pytest.mark.parametrize("layout", ["per_candidate", "shared_history"])
@torch.no_grad()
def test_its_sparse_and_dense_modules_predict_what_the_model_predicts(layout: str) -> None:
    """In the two ways that the harness calls the dense part, and then in its bfloat16."""
    gin.parse_config(SLOTS)
    gin.bind_parameter("hpgr.PreferenceGuidedSparseAttention.layout", layout)
    sparse = inference_modules.HSTUSparseInferenceModule(small_tables(), small_config())
    dense = dense_predict_module.HSTUDenseScriptModule(small_config(), small_tables())
    for module in (sparse, dense):
        module._hstu_model.set_hammer_kernel(HammerKernel.PYTORCH)
    for parameter in sparse._hstu_model._embedding_collection.parameters():
        torch.nn.init.normal_(parameter)
    state = sparse._hstu_model.state_dict()
    assert any("sem" in name for name in state)
    dense._hstu_model.load_state_dict({k: v for k, v in state.items() if "_embedding_c" not in k})
    data = batch(LENGTHS, CANDIDATES)
    expected = sparse._hstu_model(*data)[3]
    looked_up = sparse(*data)
    rows, payloads, _, lengths, _, counts = looked_up
    values, value_lengths = ts_types.flatten_seq_embeddings(rows)
    torch.testing.assert_close(dense(values, value_lengths, payloads, lengths, counts), expected)

    dense._hstu_model.to(torch.bfloat16).set_training_dtype(torch.bfloat16)
    moved = inference_modules.move_sparse_output_to_device(
        *(sparse(*data)[place] for place in (0, 1, 3, 5)), device=torch.device("cpu")
    )
    values, value_lengths = ts_types.flatten_seq_embeddings(moved[0])
    rounded = dense(values, value_lengths, *moved[1:])
    torch.testing.assert_close(rounded.float(), expected, rtol=0, atol=0.1)


def _report_class(workers: Any, answers: Any) -> None:
    """What a worker of the harness builds, without the GPU that it then moves it to."""
    built = model_family.get_hstu_model

    def report(**arguments: Any) -> Any:
        model = built(**arguments)
        hook = getattr(model, "attention_hook", None)
        answers.put((type(model).__module__, None if hook is None else hook.settings.top_k))
        raise SystemExit

    model_family.get_hstu_model = report
    workers.distributed_setup(0, 1, "")


def test_a_worker_of_several_gpus_builds_the_slots_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A spawned process has no bindings of its own."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    for name in ("MASTER_ADDR", "MASTER_PORT"):  # the host sets them
        monkeypatch.setenv(name, os.environ.get(name, ""))
    gin.parse_config(SLOTS)
    workers = model_family.ModelFamilyDenseDist(small_config(), small_tables())
    context = torch.multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=_report_class, args=(workers, answers))
    process.start()
    try:
        assert answers.get(timeout=300) == ("hpgr_plugin.hosts.dlrm_v3.model", 3)
    finally:
        process.join(60)
