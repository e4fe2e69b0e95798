"""The fused layers with the host's parameters against the host's own layers, CPU, float64."""

import logging
from typing import Any

import pytest
import torch
from generative_recommenders.common import HammerKernel
from generative_recommenders.modules.dlrm_hstu import DlrmHSTU as HostDlrmHSTU
from small_ranker import WIDTH, assert_same_step, batch, build, small_config, step

from hpgr_plugin.components.attention_hooks import PreferenceGuidedSparseAttention, StochasticLength
from hpgr_plugin.components.positions import TimeAwarePositionalEncoder
from hpgr_plugin.config.registry import configured
from hpgr_plugin.errors import HpgrError
from hpgr_plugin.hosts.dlrm_v3 import DlrmHSTU, fused
from hpgr_plugin.log_once import log_once

pytestmark = [pytest.mark.upstream, pytest.mark.usefixtures("float64_operators")]

SHAPES = {
    "random": ([7, 3, 11], [2, 1, 3]),
    "empty-history": ([0, 5, 0], [1, 2, 3]),
    "one-candidate": ([6, 0, 9], [1, 1, 1]),
    "no-candidates": ([4, 6], [0, 2]),
    "one-long": ([1, 40], [1, 4]),
}


def hooks(kind: str) -> dict[str, Any]:
    settings: dict[str, Any] = {"top_k": 3, "sigma": 1.0, "recent": 1}
    if kind == "empty":
        return {}
    if kind == "positions":
        torch.manual_seed(7)
        encoder = TimeAwarePositionalEncoder(embedding_dim=WIDTH, max_positions=128)
        return {"positional_encoder": encoder}
    if kind == "stochastic":
        return {"attention_hook": StochasticLength(alpha=1.3)}
    layout, mask_position = kind.split("-")
    return {
        "attention_hook": PreferenceGuidedSparseAttention(
            layout=layout, mask_position=mask_position, **settings
        )
    }


KINDS = (
    "empty",
    "positions",
    "stochastic",
    "per_candidate-post",
    "per_candidate-pre",
    "shared_history-post",
    "shared_history-pre",
)


def model(layers: str | None, kind: str, **config: Any) -> Any:
    return build(
        DlrmHSTU,
        dtype=torch.float64,
        config=small_config(**config),
        layers=layers,
        **hooks(kind),
    )


@pytest.mark.parametrize("later", [True, False], ids=["later", "inside"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_a_step_is_that_of_the_hosts_layers(shape: Any, kind: str, later: bool) -> None:
    data = batch(*shape, later=later)
    slots = {} if later else {"max_blind_share": 1.0}
    mine, theirs = (
        build(DlrmHSTU, dtype=torch.float64, layers=layers, **slots, **hooks(kind))
        for layers in ("fused", "host")
    )
    assert_same_step(step(mine, data), step(theirs, data))


def test_empty_slots_with_fused_layers_are_the_host_model() -> None:
    data = batch([7, 3, 11], [2, 1, 3])
    host = build(HostDlrmHSTU, dtype=torch.float64)
    assert_same_step(step(model("fused", "empty"), data), step(host, data))


def test_parameters_are_the_hosts() -> None:
    host = build(HostDlrmHSTU, dtype=torch.float64)
    mine = model("fused", "per_candidate-post")
    assert mine.state_dict().keys() == host.state_dict().keys()
    stack = mine._hstu_transducer._stu_module
    weights = fused.layer_weights(stack, torch.float64)
    for layer, used in zip(stack._stu_layers, weights, strict=True):
        assert {id(p) for p in layer.parameters()} == {id(p) for p in used}


@pytest.mark.parametrize("kind", ["per_candidate-post", "shared_history-post", "empty"])
def test_dropout_repeats_for_a_seed_and_is_off_in_evaluation(kind: str) -> None:
    data = batch([7, 3, 11], [2, 1, 3])
    mine, theirs = (
        model(layers, kind, hstu_linear_dropout_rate=0.4) for layers in ("fused", "host")
    )
    predictions = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        predictions.append(step(mine, data)[0][2].detach())
    assert torch.equal(predictions[0], predictions[1])
    assert not torch.equal(predictions[0], predictions[2])
    with torch.no_grad():
        torch.testing.assert_close(
            mine.eval()(*data)[3], theirs.eval()(*data)[3], rtol=1e-6, atol=1e-6
        )


def test_parameters_in_another_dtype_than_the_rows_get_gradients_of_their_own() -> None:
    weights = [torch.randn(3, 4, requires_grad=True), torch.randn(5, requires_grad=True)]
    cast = fused.in_dtype(weights, torch.bfloat16)
    assert [w.dtype for w in cast] == [torch.bfloat16] * 2
    grads = torch.autograd.grad(sum((w.float() * 3).sum() for w in cast), weights)
    for weight, grad in zip(weights, grads, strict=True):
        assert torch.equal(grad, torch.full_like(weight, 3.0))
    assert fused.in_dtype(weights, torch.float32) == weights


def test_fused_layers_refuse_group_norm_and_name_the_binding() -> None:
    with pytest.raises(HpgrError, match=r"hpgr\.DlrmHSTU\.layers = .fused. .*group norm"):
        model("fused", "per_candidate-post", hstu_group_norm=True)
    with pytest.raises(HpgrError, match=r"hpgr\.DlrmHSTU\.layers must be one of host, fused"):
        model("quick", "per_candidate-post")


@pytest.mark.parametrize("config", [{}, {"hstu_group_norm": True}], ids=["cpu", "group-norm"])
def test_by_default_the_hosts_layers_run_where_the_kernels_cannot(
    config: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    data = batch([7, 3, 11], [2, 1, 3])
    log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger=fused.__name__):
        by_default = model(None, "per_candidate-post", **config)
        first, second = step(by_default, data), step(by_default, data)
    theirs = step(model("host", "per_candidate-post", **config), data)
    reason = "group norm" if config else "not on a CUDA device"
    ours = [record for record in caplog.records if record.name == fused.__name__]
    assert [reason in record.getMessage() for record in ours] == [True]
    for name, gradient in theirs[1].items():
        assert torch.equal(first[1][name], gradient)
        assert torch.equal(second[1][name], gradient)


def test_wrapped_layers_run_by_themselves() -> None:
    """What is put in the place of a layer after construction, or on it, is not passed over."""
    data = batch([7, 3, 11], [2, 1, 3])
    seen: list[int] = []
    hooked = model(None, "per_candidate-post")
    layers = hooked._hstu_transducer._stu_module._stu_layers
    layers[1].register_forward_hook(lambda _, __, output: seen.append(len(output)))
    assert fused.unsupported_option(hooked._hstu_transducer._stu_module) == "hooks on a layer"
    step(hooked, data)
    assert len(seen) == 1

    class Doubled(type(layers[0])):  # type: ignore[misc]
        pass

    explicit = model("fused", "per_candidate-post")
    explicit._hstu_transducer._stu_module._stu_layers[1].__class__ = Doubled
    with pytest.raises(HpgrError, match="layers of class Doubled"):
        step(explicit, data)


def test_layers_can_be_bound() -> None:
    import gin

    gin.bind_parameter("hpgr.DlrmHSTU.layers", "fused")
    mine = build(configured("DlrmHSTU"), dtype=torch.float64)
    assert mine._hstu_transducer.layers is not None


@pytest.mark.parametrize(("size", "expected"), [(16, True), (24, False)])
def test_whether_layers_run_fused_is_known_before_a_step(size: int, expected: bool) -> None:
    """A captured step must not end up in the host's layers."""
    built = build(
        DlrmHSTU,
        kernel=HammerKernel.TRITON,
        config=small_config(hstu_attn_linear_dim=16, hstu_attn_qk_dim=size),
        **hooks("per_candidate-post"),
    )
    transducer = built._hstu_transducer
    on_cuda, on_cpu = (
        transducer.layers.expected(transducer._stu_module, torch.device(kind))
        for kind in ("cuda", "cpu")
    )
    assert on_cuda == expected
    assert not on_cpu
