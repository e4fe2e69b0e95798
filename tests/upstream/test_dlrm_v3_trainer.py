"""Hand-over and learning rates through the host's own optimizer and sharding code, on gloo."""

from pathlib import Path
from typing import Any

import gin
import pytest
import torch
from generative_recommenders.common import HammerKernel
from generative_recommenders.dlrm_v3.train import utils as train
from small_ranker import (
    NUM_ITEMS,
    TABLE_DIM,
    batch,
    build,
    recorded_lengths,
    small_config,
    small_tables,
    step,
    write_handoff,
)

from hpgr_plugin.components.attention_hooks import PreferenceGuidedSparseAttention
from hpgr_plugin.components.sem import SessionEnhancementModule
from hpgr_plugin.hosts import dlrm_v3
from hpgr_plugin.hosts.dlrm_v3.launch import topology_of
from hpgr_plugin.transfer.handoff import HandoffError

pytestmark = pytest.mark.upstream

DENSE_LR, SPARSE_LR, RATIO = 0.01, 0.04, 0.25
# Raw ids of the handed-over items: every second one, in reverse order.
IDS = list(range(NUM_ITEMS - 2, -1, -2))
OPTIMIZERS = f"""
    dense_optimizer_factory_and_class.optimizer_name = "SGD"
    dense_optimizer_factory_and_class.learning_rate = {DENSE_LR}
    sparse_optimizer_factory_and_class.optimizer_name = "SGD"
    sparse_optimizer_factory_and_class.learning_rate = {SPARSE_LR}
"""
for _optimizer in ("dense", "sparse"):
    OPTIMIZERS += f"""
    {_optimizer}_optimizer_factory_and_class.momentum = 0
    {_optimizer}_optimizer_factory_and_class.weight_decay = 0
    {_optimizer}_optimizer_factory_and_class.eps = 1e-8
    {_optimizer}_optimizer_factory_and_class.betas = (0.9, 0.999)
    """


@pytest.fixture(autouse=True)
def _attached() -> None:
    dlrm_v3.attach()
    gin.parse_config(OPTIMIZERS)


def rates_of(optimizer: Any) -> set[float]:
    return {round(group["lr"], 6) for group in optimizer.param_groups}  # fused: in float32


def make_sem(**settings: Any) -> SessionEnhancementModule:
    return SessionEnhancementModule(embedding_dim=TABLE_DIM, num_heads=2, **settings)


@pytest.fixture
def handoff(tmp_path: Path) -> tuple[Path, torch.Tensor, SessionEnhancementModule]:
    """A file, and what is in it."""
    path, sem = tmp_path / "stage1.safetensors", make_sem(causal=True)
    with torch.no_grad():
        sem.gate.fill_(0.5)
    table = torch.randn(len(IDS), TABLE_DIM)
    write_handoff(path, table, sem, extra={"item_ids": IDS})
    return path, table, sem


def test_rows_go_to_the_ids_they_belong_to_and_others_stay(handoff: Any) -> None:
    path, table, sem = handoff
    model = build(dlrm_v3.DlrmHSTU, sem=make_sem(), pretrained=str(path))
    weight = model._embedding_collection.embeddings["item_table"].weight
    before = weight.detach().clone()
    model.load_pretrained()
    torch.testing.assert_close(weight[IDS], table)
    torch.testing.assert_close(weight[1::2], before[1::2], rtol=0, atol=0)
    for name, value in sem.state_dict().items():
        torch.testing.assert_close(model.sem.state_dict()[name], value)


def test_loading_before_the_tables_are_materialised_is_an_error(handoff: Any) -> None:
    model = dlrm_v3.DlrmHSTU(
        small_config(), small_tables(), is_inference=False, pretrained=str(handoff[0])
    )
    with pytest.raises(RuntimeError, match="'item_table' is on meta"):
        model.load_pretrained()


def test_a_hand_over_that_does_not_fit_is_refused_when_building(
    handoff: Any, tmp_path: Path
) -> None:
    wide = write_handoff(tmp_path / "wide.safetensors", torch.zeros(3, TABLE_DIM + 1))
    with pytest.raises(HandoffError, match="embedding_dim"):
        build(dlrm_v3.DlrmHSTU, pretrained=wide)
    with pytest.raises(HandoffError, match="0 to 39"):
        build(
            dlrm_v3.DlrmHSTU,
            pretrained=str(handoff[0]),
            table_config={"item_table": {"num_embeddings": 40}},
        )
    table, sem = torch.zeros(3, TABLE_DIM), make_sem(causal=False)
    whole = write_handoff(tmp_path / "whole.safetensors", table, sem)
    with pytest.raises(HandoffError, match="causal"):
        build(dlrm_v3.DlrmHSTU, sem=make_sem(), pretrained=whole)
    taken = build(dlrm_v3.DlrmHSTU, sem=make_sem(), pretrained=whole, hide_future=False)
    assert taken.sem.causal is False
    with pytest.raises(ValueError, match="inherited_lr_ratio"):
        build(dlrm_v3.DlrmHSTU, sem=make_sem(), pretrained=str(handoff[0]), inherited_lr_ratio=1.5)


def test_a_frozen_table_scores_by_the_handed_over_rows(handoff: Any) -> None:
    path, table, _ = handoff
    hook = PreferenceGuidedSparseAttention(top_k=2, table="frozen")
    model = build(dlrm_v3.DlrmHSTU, attention_hook=hook, pretrained=str(path))
    assert hook.frozen_table.shape == (NUM_ITEMS, TABLE_DIM)  # ids up to 48, and one zero row
    torch.testing.assert_close(hook.frozen_table[NUM_ITEMS - 2], table[0])
    data = batch([9, 0, 4], [2, 1, 1])
    lengths = recorded_lengths(model)
    first = step(model, data)[0]
    with torch.no_grad():  # other weights of the live table select the same rows
        model._embedding_collection.embeddings["item_table"].weight.mul_(-1)
    model(*data)
    with torch.no_grad():
        model._embedding_collection.embeddings["item_table"].weight.mul_(-1)
    again = step(model, data)[0]
    assert lengths[0] == lengths[1] == lengths[2]
    for mine, theirs in zip(first, again, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


@pytest.mark.usefixtures("gloo")
def test_sharded_tables_get_the_rows_and_every_group_its_rate(handoff: Any) -> None:
    path, table, _ = handoff
    model = dlrm_v3.DlrmHSTU(
        small_config(),
        small_tables(),
        is_inference=False,
        bf16_training=False,
        sem=make_sem(),
        attention_hook=PreferenceGuidedSparseAttention(top_k=4),
        pretrained=str(path),
        inherited_lr_ratio=RATIO,
    )
    model.set_hammer_kernel(HammerKernel.PYTORCH)
    device = torch.device("cpu")
    with topology_of(device):
        parallel, optimizer = train.make_optimizer_and_shard(model, device, world_size=1)
    assert "Sharded" in type(model._embedding_collection).__name__

    def tables() -> dict[str, torch.Tensor]:
        state = model._embedding_collection.state_dict()
        return {
            name: state[f"embeddings.{name}.weight"].local_shards()[0].tensor
            for name in ("item_table", "category_table")
        }

    torch.testing.assert_close(tables()["item_table"][IDS], table)
    assert rates_of(optimizer) == {DENSE_LR, DENSE_LR * RATIO}
    assert rates_of(parallel.fused_optimizer) == {SPARSE_LR, SPARSE_LR * RATIO}

    # Plain SGD: a step is the gradient times the rate, seen in the weights themselves.
    data = batch([6, 2, 9], [2, 1, 2])
    reference = build(
        dlrm_v3.DlrmHSTU, sem=make_sem(), attention_hook=PreferenceGuidedSparseAttention(top_k=4)
    )
    weights = {n: v for n, v in model.state_dict().items() if not n.startswith("_embedding")}
    reference.load_state_dict(weights, strict=False)
    collection = reference._embedding_collection
    sharded = model._embedding_collection.state_dict()
    with torch.no_grad():
        for name in small_tables():
            shard = sharded[f"embeddings.{name}.weight"].local_shards()[0].tensor
            collection.embeddings[name].weight.copy_(shard)
    _, gradients = step(reference, data)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    before_tables = {n: t.clone() for n, t in tables().items()}

    parallel.train()
    optimizer.zero_grad()
    losses = parallel(*data)[2]
    sum(losses.values()).backward()
    optimizer.step()

    gate = "_hstu_transducer._input_preprocessor.sem.gate"
    dense = "_hstu_transducer._stu_module._stu_layers.0._uvqk_weight"
    for name, rate in ((gate, DENSE_LR * RATIO), (dense, DENSE_LR)):
        moved = before[name] - dict(model.named_parameters())[name]
        torch.testing.assert_close(moved, rate * gradients[name], rtol=1e-3, atol=1e-7)
        assert gradients[name].abs().sum() > 0
    for name, rate in (("item_table", SPARSE_LR * RATIO), ("category_table", SPARSE_LR)):
        gradient = gradients[f"_embedding_collection.embeddings.{name}.weight"]
        moved = before_tables[name] - tables()[name]
        torch.testing.assert_close(moved, rate * gradient, rtol=1e-3, atol=1e-6)
        seen = float((moved * gradient).sum() / gradient.square().sum())
        assert seen == pytest.approx(rate, rel=1e-3)


@pytest.mark.usefixtures("gloo")
def test_without_a_hand_over_there_is_one_rate_as_in_the_host() -> None:
    model = dlrm_v3.DlrmHSTU(
        small_config(), small_tables(), is_inference=False, bf16_training=False, sem=make_sem()
    )
    device = torch.device("cpu")
    with topology_of(device):
        parallel, optimizer = train.make_optimizer_and_shard(model, device, world_size=1)
    assert rates_of(optimizer) == {DENSE_LR}
    assert rates_of(parallel.fused_optimizer) == {SPARSE_LR}
