"""Each seam of the patch series, on a host that has it: no use, no change; in use, it works."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gin
import pytest
import torch
from generative_recommenders.common import HammerKernel
from generative_recommenders.dlrm_v3.train import train_ranker
from generative_recommenders.dlrm_v3.train import utils as ranking
from generative_recommenders.modules import dlrm_hstu
from generative_recommenders.modules.stu import STULayer, STULayerConfig, STUStack
from generative_recommenders.research.modeling.sequential import encoder_utils
from generative_recommenders.research.modeling.sequential import (
    input_features_preprocessors as preprocessors,
)
from generative_recommenders.research.trainer import train as retrieval
from small_ranker import small_config
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from hpgr_plugin.hosts.contract import accepts
from hpgr_plugin.hosts.seams import host_has_seam

pytestmark = [
    pytest.mark.upstream,
    pytest.mark.skipif(
        not host_has_seam("encoders"), reason="the host on the path lacks the patch series"
    ),
]


def stack(layers: int = 2, width: int = 16, head: int = 8) -> STUStack:
    torch.manual_seed(0)
    config = STULayerConfig(
        embedding_dim=width,
        num_heads=2,
        hidden_dim=head,
        attention_dim=head,
        output_dropout_ratio=0.0,
    )
    built = STUStack([STULayer(config) for _ in range(layers)])
    built.set_hammer_kernel(HammerKernel.PYTORCH)
    return built


def sequences(lengths: list[int], width: int = 16) -> dict[str, Any]:
    torch.manual_seed(1)
    return {
        "x": torch.randn(sum(lengths), width, requires_grad=True),
        "x_lengths": torch.tensor(lengths),
        "x_offsets": torch.tensor([0, *lengths]).cumsum(0),
        "max_seq_len": max(lengths),
        "num_targets": torch.ones(len(lengths), dtype=torch.int64),
    }


def test_value_scale_of_ones_and_none_is_the_host() -> None:
    inputs = sequences([5, 1, 9])
    model = stack()
    plain = model(**inputs)
    torch.testing.assert_close(model(**inputs, value_scale=None), plain, rtol=0, atol=0)
    torch.testing.assert_close(model(**inputs, value_scale=torch.ones(15)), plain)


def test_value_scale_is_a_weight_on_the_attention_columns() -> None:
    """Against an attention matrix written out, value and gradient."""
    inputs = sequences([6])
    scale = torch.rand(6)
    (layer,) = stack(layers=1)._stu_layers
    mine = layer(**inputs, value_scale=scale)
    theirs = naive_layer(layer, inputs["x"], scale)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    upstream = torch.randn_like(mine)
    (g_mine,) = torch.autograd.grad(mine, inputs["x"], upstream)
    (g_theirs,) = torch.autograd.grad(theirs, inputs["x"], upstream)
    torch.testing.assert_close(g_mine, g_theirs, rtol=1e-4, atol=1e-5)


def naive_layer(layer: Any, x: Tensor, scale: Tensor) -> Tensor:
    """One sequence whose last token is its only target, every step in the open."""
    heads, hidden, qk = layer._num_heads, layer._hidden_dim, layer._attention_dim
    normed = nn.functional.layer_norm(
        x, x.shape[-1:], layer._input_norm_weight, layer._input_norm_bias, 1e-6
    )
    uvqk = normed @ layer._uvqk_weight + layer._uvqk_beta
    u, v, q, k = uvqk.split([heads * hidden, heads * hidden, heads * qk, heads * qk], dim=1)
    rows = len(x)
    scores = torch.einsum("ihd,jhd->hij", q.view(rows, heads, qk), k.view(rows, heads, qk))
    weights = nn.functional.silu(scores * layer._attn_alpha) / rows
    weights = weights * torch.ones(rows, rows).tril() * scale
    attention = torch.einsum("hij,jhd->ihd", weights, v.view(rows, heads, hidden)).reshape(rows, -1)
    u = nn.functional.silu(u)
    y = u * nn.functional.layer_norm(
        attention, attention.shape[-1:], layer._output_norm_weight, layer._output_norm_bias, 1e-6
    )
    projected: Tensor = x + torch.cat([u, attention, y], dim=1) @ layer._output_weight
    return projected


def test_value_scale_reaches_every_layer_of_a_stack() -> None:
    inputs = sequences([6, 4])
    model = stack()
    scale = torch.rand(10)
    x = inputs.pop("x")
    by_hand = x
    for layer in model._stu_layers:
        by_hand = layer(x=by_hand, **inputs, value_scale=scale)
    torch.testing.assert_close(model(x=x, **inputs, value_scale=scale), by_hand, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[70, 1, 130], [1], [256, 255]])
def test_value_scale_on_the_triton_kernels(lengths: list[int]) -> None:
    """Against the PyTorch kernels in float32, value and gradient."""
    results = []
    for kernel, dtype in ((HammerKernel.TRITON, torch.bfloat16), (HammerKernel.PYTORCH, None)):
        inputs = {
            name: value.cuda() if isinstance(value, Tensor) else value
            for name, value in sequences(lengths, width=64).items()
        }
        x = inputs.pop("x").detach().to(dtype or torch.float32).requires_grad_()
        scale = torch.linspace(0, 1, len(x), device="cuda")
        model = stack(width=64, head=32).cuda()
        model.set_hammer_kernel(kernel)
        output = model(x=x, **inputs, value_scale=scale)
        weight = torch.linspace(-1, 1, output.numel(), device="cuda").view_as(output)
        (output.float() * weight).sum().backward()
        results.append((output.float(), x.grad.float()))
    for mine, theirs in zip(*results, strict=True):
        error = (mine - theirs).norm() / theirs.norm()
        assert error < 2e-2, error


def ranker(cls: type, is_inference: bool = False) -> Any:
    torch.manual_seed(0)
    return cls(small_config(), {}, is_inference, is_dense=True)


def test_parts_of_dlrm_hstu_are_class_attributes() -> None:
    parts = {
        "stu_layer_cls": dlrm_hstu.STULayer,
        "positional_encoder_cls": dlrm_hstu.HSTUPositionalEncoder,
        "preprocessor_cls": dlrm_hstu.ContextualPreprocessor,
        "transducer_cls": dlrm_hstu.HSTUTransducer,
    }
    own = {name: type(f"Own{part.__name__}", (part,), {}) for name, part in parts.items()}
    model = ranker(type("Own", (dlrm_hstu.DlrmHSTU,), own))
    built = {type(module) for module in model.modules()}
    assert set(own.values()) <= built
    default = ranker(dlrm_hstu.DlrmHSTU)
    assert {type(module) for module in default.modules()} == (
        built - set(own.values()) - {type(model)}
    ) | set(parts.values()) | {dlrm_hstu.DlrmHSTU}
    mine, theirs = model.state_dict(), default.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_make_model_takes_a_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking, "get_hstu_configs", lambda dataset: small_config())
    monkeypatch.setattr(ranking, "get_embedding_table_config", lambda dataset: {})
    own = type("Own", (dlrm_hstu.DlrmHSTU,), {})
    assert type(ranking.make_model("any")[0]) is dlrm_hstu.DlrmHSTU
    gin.bind_parameter("make_model.model_cls", own)
    model, config, tables = ranking.make_model("any")
    assert type(model) is own
    assert (type(config), tables) == (dlrm_hstu.DlrmHSTUConfig, {})


def test_train_ranker_takes_any_gin_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started: list[Any] = []
    monkeypatch.setattr(
        train_ranker.mp, "start_processes", lambda _, args, **rest: started.append(args)
    )
    for arguments, expected in (
        (["--dataset", "debug"], "debug.gin"),
        (["--gin_file", "own.gin"], "own.gin"),
    ):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["train_ranker.py", *arguments])
        train_ranker.main()
        assert Path(started[-1][2]).name == expected
    assert Path(started[-1][2]).parent == tmp_path  # absolute: a worker may start elsewhere


def test_lr_scale_gives_groups_to_the_dense_optimizer() -> None:
    fresh, slow = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))
    slow.lr_scale = 0.1  # type: ignore[attr-defined]
    factory = ranking.scaled_groups(lambda groups: torch.optim.SGD(groups, lr=2.0))
    rates = {len(g["params"][0]): g["lr"] for g in factory([fresh, slow]).param_groups}
    assert rates == {2: 2.0, 3: pytest.approx(0.2)}
    (only,) = factory([fresh]).param_groups
    assert only["lr"] == 2.0


def test_registered_encoders_come_first_and_unknown_ones_still_raise() -> None:
    gin.bind_parameter("get_sequential_encoder.activation_checkpoint", False)
    arguments = dict.fromkeys(
        (
            "max_sequence_length",
            "max_output_length",
            "embedding_module",
            "interaction_module",
            "input_preproc_module",
            "output_postproc_module",
            "verbose",
        )
    )
    seen: dict[str, Any] = {}
    encoder_utils.ENCODERS["own"] = lambda **given: seen.update(given) or "built"
    try:
        assert encoder_utils.get_sequential_encoder(module_type="own", **arguments) == "built"
    finally:
        del encoder_utils.ENCODERS["own"]
    assert all(accepts(encoder_utils.hstu_encoder, name) for name in seen)
    with pytest.raises(ValueError, match="Unsupported module_type own"):
        encoder_utils.get_sequential_encoder(module_type="own", **arguments)


def test_train_fn_takes_a_preprocessor_and_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The warm-up writes each group its share of the rate."""
    if torch.cuda.is_available():
        pytest.skip("trains on the CPU")
    project = Path(__file__).parents[2]
    monkeypatch.syspath_prepend(str(project / "examples" / "upstream"))
    import retrieval_data

    retrieval_data.write(tmp_path, users=12)
    monkeypatch.chdir(tmp_path)
    rates: list[dict[str, float]] = []
    given: list[tuple[Any, ...]] = []

    def preprocessor(*arguments: Any) -> Any:
        given.append(arguments)
        return preprocessors.LearnablePositionalEmbeddingInputFeaturesPreprocessor(*arguments)

    def groups(model: nn.Module, rate: float, decay: float) -> list[dict[str, Any]]:
        table = [p for n, p in model.named_parameters() if "_item_emb" in n]
        rest = [p for n, p in model.named_parameters() if "_item_emb" not in n]
        return [
            {"params": rest, "weight_decay": decay},
            {"params": table, "lr": rate * 0.5, "lr_scale": 0.5},
        ]

    def note(optimizer: Any, args: Any, kwargs: Any) -> None:
        rates.append({str(g.get("lr_scale", 1.0)): g["lr"] for g in optimizer.param_groups})

    gin.parse_config_file(str(project / "configs" / "upstream" / "retrieval_synthetic.gin"))
    for name in ("sem", "positional_encoder", "pretrained"):
        gin.bind_parameter(f"hpgr.SequentialEncoder.{name}", None)
    handle = register_optimizer_step_pre_hook(note)
    try:
        retrieval.train_fn(
            0,
            1,
            12396,
            num_epochs=3,
            num_warmup_steps=2,
            local_batch_size=12,
            partial_eval_num_iters=1,
            input_preproc_cls=preprocessor,
            param_groups_fn=groups,
        )
    finally:
        handle.remove()
    assert given == [(50 + 10 + 1, 32, 0.1)]
    assert rates == [
        {"1.0": pytest.approx(share * 3e-3), "0.5": pytest.approx(share * 1.5e-3)}
        for share in (0.5, 1.0, 1.0)
    ]


def test_setup_without_a_gpu_is_gloo(tmp_path: Path) -> None:
    """In processes of their own: a group belongs to the process."""
    if torch.cuda.is_available():
        pytest.skip("without a GPU only")
    for lines in (
        "from generative_recommenders.research.trainer.train import setup;setup(0, 1, 12397)",
        "import torch\nfrom generative_recommenders.dlrm_v3.train.utils import setup\n"
        "setup(0, 1, 12398, torch.device('cpu'))",
    ):
        program = f"{lines}\nimport torch.distributed as d\nassert d.get_backend() == 'gloo'"
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", program],
            capture_output=True,
            text=True,
            env=os.environ,
        )
        assert done.returncode == 0, done.stderr
