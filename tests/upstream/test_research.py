"""The slots of the retrieval adapter in the host's encoders, on CPU."""

import importlib
import sys
from pathlib import Path
from typing import Any

import gin
import pytest
import torch
from generative_recommenders.research.modeling.sequential import encoder_utils
from generative_recommenders.research.modeling.sequential import (
    input_features_preprocessors as preprocessors,
)
from generative_recommenders.research.trainer import train as host_train
from small_retrieval import DIM, MAX_LENGTH, NUM_ITEMS, WIDTH, batch, build, run
from torch import Tensor, nn

from hpgr_plugin.components.attention_hooks import PreferenceGuidedSparseAttention, StochasticLength
from hpgr_plugin.components.positions import TimeAwarePositionalEncoder
from hpgr_plugin.components.sem import SessionEnhancementModule
from hpgr_plugin.hosts import research
from hpgr_plugin.hosts.contract import HostContractError
from hpgr_plugin.hosts.research.attach import host_parameter_groups, replaced_names
from hpgr_plugin.hosts.research.pretrained import host_item_digest
from hpgr_plugin.hosts.seams import host_has_seam
from hpgr_plugin.transfer.handoff import HandoffError, save_handoff

pytestmark = pytest.mark.upstream

ENCODERS = ("HSTU", "SASRec")
LENGTHS = [7, 1, MAX_LENGTH, 4]


@pytest.fixture(autouse=True)
def _attached() -> Any:
    gin.bind_parameter("get_sequential_encoder.activation_checkpoint", False)
    research.attach()
    yield
    research.attach()


def sem(**settings: Any) -> SessionEnhancementModule:
    torch.manual_seed(5)
    module = SessionEnhancementModule(
        **{"embedding_dim": DIM, "num_heads": 2, "causal": True, **settings}
    )
    if module.fusion == "gate":
        with torch.no_grad():
            module.gate.normal_()  # the gate starts at zero: let the context through
    return module


def positional_encoder() -> TimeAwarePositionalEncoder:
    torch.manual_seed(6)
    return TimeAwarePositionalEncoder(embedding_dim=DIM, max_positions=MAX_LENGTH)


def slots(**values: Any) -> None:
    """Bind slots; gin hands a copy of each value to every encoder it builds."""
    for name, value in values.items():
        gin.bind_parameter(f"hpgr.SequentialEncoder.{name}", value)


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad for n, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("module_type", ENCODERS)
def test_empty_slots_are_the_host_to_the_last_bit(module_type: str) -> None:
    with_adapter = build(module_type)
    research.detach()
    host = build(module_type)
    inputs = batch(LENGTHS)
    outputs = []
    for encoder in (with_adapter, host):
        torch.manual_seed(1)  # SASRec drops out
        output = run(encoder, inputs)
        (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
        outputs.append(output)
    assert torch.equal(*outputs)
    mine, theirs = gradients(with_adapter), gradients(host)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_attach_is_idempotent_and_can_be_undone() -> None:
    research.attach()
    before = host_train.get_sequential_encoder
    research.attach()
    assert host_train.get_sequential_encoder is before
    research.detach()
    assert not research.attached()
    assert host_train.get_sequential_encoder is encoder_utils.get_sequential_encoder
    assert replaced_names() == []
    assert getattr(encoder_utils, "ENCODERS", {}) == {}
    slots(sem=sem())
    assert "Hierarchical" not in type(build()._input_features_preproc).__name__
    research.detach()
    research.attach()
    assert "Hierarchical" in type(build()._input_features_preproc).__name__


def test_names_replaced_with_and_without_the_patch_series() -> None:
    expected = (
        [] if host_has_seam("encoders") else [f"{host_train.__name__}.get_sequential_encoder"]
    )
    assert replaced_names() == expected


@pytest.mark.parametrize("module_type", ENCODERS)
@pytest.mark.parametrize("fusion", ["gate", "add"])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_no_future_reaches_the_past(module_type: str, fusion: str, pooling: str) -> None:
    slots(sem=sem(fusion=fusion, pooling=pooling), positional_encoder=positional_encoder())
    encoder = build(module_type).eval()
    inputs = batch([MAX_LENGTH])
    whole = run(encoder, inputs)
    for cut in range(1, MAX_LENGTH):
        changed = {name: tensor.clone() for name, tensor in inputs.items()}
        changed["past_ids"][:, cut:MAX_LENGTH] = 1 + changed["past_ids"][:, cut:MAX_LENGTH] % 7
        changed["timestamps"][:, cut + 1 :] += 90_000 * torch.arange(1, WIDTH - cut)
        torch.testing.assert_close(run(encoder, changed)[:, :cut], whole[:, :cut])


def test_sem_changes_what_follows_a_session_and_nothing_in_the_first() -> None:
    encoder = build()
    slots(sem=sem())
    enriched = build()
    inputs = batch([MAX_LENGTH], pauses=False)
    inputs["timestamps"][:, 5:] += 86_400
    before, after = (run(model.eval(), inputs) for model in (encoder, enriched))
    torch.testing.assert_close(after[:, :5], before[:, :5])
    changed = (after[0, 5:MAX_LENGTH] - before[0, 5:MAX_LENGTH]).abs().amax(dim=1)
    assert (changed > 1e-4).all()


def test_positions_stand_where_the_host_s_stood() -> None:
    """The host with our table as its own computes the same."""
    slots(positional_encoder=positional_encoder())
    mine = build()
    table = mine._input_features_preproc.positional_encoder.table.weight
    gin.clear_config()
    gin.bind_parameter("get_sequential_encoder.activation_checkpoint", False)
    theirs = build()
    with torch.no_grad():
        theirs._input_features_preproc._pos_emb.weight[:MAX_LENGTH] = table
    inputs = batch(LENGTHS)
    outputs = [run(model, inputs) for model in (mine, theirs)]
    for output in outputs:
        output.square().sum().backward(retain_graph=True)
        (output[..., 0].sum()).backward()
    torch.testing.assert_close(*outputs)
    host_table = theirs._input_features_preproc._pos_emb.weight.grad[:MAX_LENGTH]
    torch.testing.assert_close(table.grad, host_table, rtol=1e-4, atol=1e-5)
    names = [name for name, _ in mine.named_parameters()]
    assert not [name for name in names if "_pos_emb" in name]


def test_a_model_in_bfloat16_trains() -> None:
    """train_fn.main_module_bf16 turns the whole encoder, slots included."""
    slots(sem=sem(), positional_encoder=positional_encoder())
    encoder = build().to(torch.bfloat16)
    output = run(encoder, batch(LENGTHS))
    output.float().square().mean().backward()
    own = encoder._input_features_preproc
    assert output.dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.isfinite().all() for p in own.parameters())


def test_rows_past_the_history_go_through_unchanged() -> None:
    slots(sem=sem(), positional_encoder=positional_encoder())
    preprocessor = build()._input_features_preproc
    inputs = batch(LENGTHS)
    embeddings = torch.randn(len(LENGTHS), WIDTH, DIM)
    enriched = preprocessor._enrich(inputs["past_lengths"], embeddings, inputs["timestamps"])
    outside = torch.arange(WIDTH) >= inputs["past_lengths"].unsqueeze(1)
    assert torch.equal(enriched[outside], embeddings[outside])
    assert not torch.equal(enriched[~outside], embeddings[~outside])


def test_every_parameter_of_a_slot_has_a_gradient_in_a_batch_of_single_sessions() -> None:
    """The host's DistributedDataParallel stops at a parameter without one."""
    slots(sem=sem(), positional_encoder=positional_encoder())
    encoder = build().train()
    inputs = batch([1, 3], pauses=False)
    run(encoder, inputs).sum().backward()
    own = encoder._input_features_preproc
    assert all(p.grad is not None and p.grad.isfinite().all() for p in own.parameters())


@pytest.mark.parametrize("hook", [PreferenceGuidedSparseAttention, StochasticLength])
def test_a_hook_is_refused_with_the_reason(hook: type) -> None:
    value = hook(alpha=1.5) if hook is StochasticLength else hook()
    slots(attention_hook=value)
    with pytest.raises(ValueError, match=rf"got a {hook.__name__}.*there is no candidate"):
        build()


def test_unfit_slots_are_refused() -> None:
    slots(sem=sem(causal=False))
    with pytest.raises(ValueError, match="causal must be True or None here, got False"):
        build()
    slots(sem=sem(embedding_dim=8))
    with pytest.raises(
        ValueError, match=f"sem must have .* embedding_dim={DIM}, got embedding_dim=8"
    ):
        build()
    slots(
        sem=None,
        positional_encoder=TimeAwarePositionalEncoder(embedding_dim=DIM, form="relative"),
    )
    with pytest.raises(ValueError, match=r"positional_encoder takes .*form = 'absolute'"):
        build()
    slots(sem=None, positional_encoder=positional_encoder())
    interleaved = preprocessors.CombinedItemAndRatingInputFeaturesPreprocessor(
        max_sequence_len=WIDTH, item_embedding_dim=DIM, dropout_rate=0.0, num_ratings=6
    )
    with pytest.raises(ValueError, match="CombinedItemAndRating"):
        build(preprocessor=interleaved)


def test_missing_timestamps_and_disorder_are_named() -> None:
    slots(sem=sem())
    encoder = build()
    inputs = batch([5])
    with pytest.raises(ValueError, match='must hold "timestamps"'):
        encoder(
            past_lengths=inputs["past_lengths"],
            past_ids=inputs["past_ids"],
            past_embeddings=encoder.get_item_embeddings(inputs["past_ids"]),
            past_payloads={},
        )
    inputs["timestamps"][0, 2] -= 10_000_000
    with pytest.raises(ValueError, match="timestamps"):
        run(encoder, inputs)


def handoff(path: Path, *, num_items: int = NUM_ITEMS, with_sem: bool = True) -> Tensor:
    torch.manual_seed(9)
    table = torch.randn(num_items, DIM)
    module = sem() if with_sem else None
    save_handoff(
        path,
        item_table=table,
        sem=module,
        vocabulary_digest=host_item_digest(num_items),
        gap_seconds=1800,
    )
    return table


@pytest.mark.parametrize("module_type", ENCODERS)
def test_hand_over_fills_table_and_sem_and_survives_the_constructor(
    tmp_path: Path, module_type: str
) -> None:
    table = handoff(tmp_path / "stage1.safetensors")
    fresh = SessionEnhancementModule(embedding_dim=DIM, num_heads=2)
    slots(sem=fresh, pretrained=str(tmp_path / "stage1.safetensors"))
    encoder = build(module_type)
    weight = encoder._embedding_module._item_emb.weight
    assert torch.equal(weight[1:], table)
    research.detach()
    gin.bind_parameter("hpgr.SequentialEncoder.pretrained", None)
    padding = build(module_type)._embedding_module._item_emb.weight[0]
    assert torch.equal(weight[0], padding)
    inherited = encoder._input_features_preproc.sem.state_dict()
    assert all(torch.equal(inherited[name], value) for name, value in sem().state_dict().items())


def test_a_fresh_sem_keeps_its_own_initial_values() -> None:
    """The host's constructor re-initialises every matrix that it finds."""
    slots(sem=sem())
    state = build()._input_features_preproc.sem.state_dict()
    assert all(torch.equal(state[name], value) for name, value in sem().state_dict().items())


def test_hand_over_of_other_items_is_refused(tmp_path: Path) -> None:
    handoff(tmp_path / "stage1.safetensors", num_items=NUM_ITEMS - 1)
    slots(pretrained=str(tmp_path / "stage1.safetensors"))
    with pytest.raises(HandoffError, match="num_items is 59 there, 60 here"):
        build()


def train_like_the_host(model: nn.Module, optimizer: Any, steps: int, warmup: int) -> None:
    """Its warm-up, which writes one rate into all groups; a gradient of ones."""
    for step in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        if step < warmup:
            for group in optimizer.param_groups:
                group["lr"] = min(1.0, (step + 1) / warmup)
                if host_has_seam("param_groups_fn"):
                    group["lr"] *= group.get("lr_scale", 1.0)
        optimizer.step()


@pytest.mark.parametrize("warmup", [0, 4])
def test_inherited_weights_move_at_their_share_of_the_rate(tmp_path: Path, warmup: int) -> None:
    handoff(tmp_path / "stage1.safetensors")
    slots(
        sem=SessionEnhancementModule(embedding_dim=DIM, num_heads=2, causal=True),
        positional_encoder=positional_encoder(),
        pretrained=str(tmp_path / "stage1.safetensors"),
        inherited_lr_ratio=0.25,
    )
    encoder = build()
    before = {name: value.detach().clone() for name, value in encoder.named_parameters()}
    if host_has_seam("param_groups_fn"):
        optimizer = torch.optim.SGD(host_parameter_groups(encoder, 1.0, 0.0), lr=1.0)
    else:
        optimizer = torch.optim.SGD(encoder.parameters(), lr=1.0)
    train_like_the_host(encoder, optimizer, steps=6, warmup=warmup)
    moved = sum(min(1.0, (step + 1) / warmup) if step < warmup else 1.0 for step in range(6))
    inherited = 0
    for name, parameter in encoder.named_parameters():
        share = 0.25 if "_item_emb" in name or ".sem." in name else 1.0
        inherited += share == 0.25
        torch.testing.assert_close(
            before[name] - parameter, torch.full_like(parameter, moved * share)
        )
    assert inherited == 1 + len(list(sem().parameters()))
    assert [group["lr"] for group in optimizer.param_groups if "lr_scale" not in group] == [1.0]


def test_optimizers_without_inherited_weights_are_left_alone() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    parameter.grad = torch.ones(3)
    optimizer.step()
    assert len(optimizer.param_groups) == 1
    assert torch.equal(parameter.detach(), torch.full((3,), -0.5))


def test_a_cleared_configuration_is_noticed(tmp_path: Path) -> None:
    if not host_has_seam("param_groups_fn"):
        pytest.skip("without the patch series no gin binding is involved")
    handoff(tmp_path / "stage1.safetensors", with_sem=False)
    gin.clear_config()
    gin.bind_parameter("get_sequential_encoder.activation_checkpoint", False)
    slots(pretrained=str(tmp_path / "stage1.safetensors"))
    with pytest.raises(RuntimeError, match=r"call hosts\.research\.attach"):
        build()


def test_groups_of_the_user_s_own_are_kept() -> None:
    if not host_has_seam("param_groups_fn"):
        pytest.skip("without the patch series no gin binding is involved")
    gin.bind_parameter("train_fn.param_groups_fn", len)
    research.attach()
    assert gin.query_parameter("train_fn.param_groups_fn") is len


def test_a_moved_host_is_named_at_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(encoder_utils, "sasrec_encoder")
    for name in [name for name in sys.modules if name.startswith("hpgr_plugin.hosts.research")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(HostContractError, match=r"encoder_utils\.sasrec_encoder: not there"):
        importlib.import_module("hpgr_plugin.hosts.research")


def test_slots_come_from_a_gin_file(tmp_path: Path) -> None:
    """The line a user adds, and two evaluations of one reference are two modules."""
    gin.parse_config(
        f"""
        import hpgr_plugin.hosts.research
        hpgr.SequentialEncoder.sem = @hpgr.SessionEnhancementModule()
        hpgr.SessionEnhancementModule.embedding_dim = {DIM}
        """
    )
    first, second = (build()._input_features_preproc.sem for _ in range(2))
    assert isinstance(first, SessionEnhancementModule)
    assert first is not second
    assert first.causal
