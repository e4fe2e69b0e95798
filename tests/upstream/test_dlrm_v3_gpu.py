"""DlrmHSTU with the host's Triton kernels and all slots, forward and backward, on a CUDA device.

The reference is the same model with the same weights on the CPU, PyTorch kernels, float64.
"""

import copy
from typing import Any

import pytest
import torch
from generative_recommenders.common import HammerKernel
from generative_recommenders.modules.dlrm_hstu import DlrmHSTU as HostDlrmHSTU
from small_ranker import TABLE_DIM, batch, build, in_dtype, small_config, step
from torch import Tensor

from hpgr_plugin.components.attention_hooks import PreferenceGuidedSparseAttention, StochasticLength
from hpgr_plugin.components.positions import TimeAwarePositionalEncoder
from hpgr_plugin.components.sem import SessionEnhancementModule
from hpgr_plugin.errors import HpgrError
from hpgr_plugin.hosts.dlrm_v3 import DlrmHSTU, fused

pytestmark = [
    pytest.mark.upstream,
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.usefixtures("float64_operators", "few_configurations"),
]

WIDTH, HEADS, HEAD_DIM = 128, 2, 64
LENGTHS, CANDIDATES = [190, 7, 0, 64, 131, 250, 33, 1], [4, 1, 2, 3, 4, 2, 1, 3]


def config() -> Any:
    return small_config(
        max_seq_len=512,
        hstu_num_heads=HEADS,
        hstu_attn_linear_dim=HEAD_DIM,
        hstu_attn_qk_dim=HEAD_DIM,
        hstu_transducer_embedding_dim=WIDTH,
        hstu_preprocessor_hidden_dim=64,
    )


def slots(kind: str) -> dict[str, Any]:
    sem = SessionEnhancementModule(embedding_dim=TABLE_DIM, num_heads=2)
    with torch.no_grad():
        sem.gate.fill_(0.3)
    encoder = TimeAwarePositionalEncoder(embedding_dim=WIDTH, max_positions=512)
    hooks = {
        "per_candidate": lambda: PreferenceGuidedSparseAttention(
            top_k=8, sigma=1.0, recent=8, layout="per_candidate"
        ),
        "shared_history": lambda: PreferenceGuidedSparseAttention(
            top_k=8, sigma=1.0, recent=8, layout="shared_history"
        ),
        "pre": lambda: PreferenceGuidedSparseAttention(
            top_k=8, sigma=1.0, mask_position="pre", layout="per_candidate"
        ),
        "stochastic": lambda: StochasticLength(alpha=1.6),
        "none": lambda: None,
    }
    return {"sem": sem, "positional_encoder": encoder, "attention_hook": hooks[kind]()}


def relative_error(mine: Tensor, reference: Tensor) -> float:
    reference = reference.double()
    scale = reference.square().mean().sqrt().clamp(min=1e-12)
    return float((mine.cpu().double() - reference).square().mean().sqrt() / scale)


def build_on_gpu(model_class: type, **arguments: Any) -> Any:
    """The model on CUDA, through Triton."""
    kernel = HammerKernel.TRITON
    return build(model_class, config=config(), device="cuda", kernel=kernel, **arguments)


def models(kind: str, bf16: bool, layers: str) -> tuple[Any, Any]:
    """On CUDA through Triton, and a float64 copy on the CPU with the host's layers."""
    on_gpu = build_on_gpu(DlrmHSTU, bf16_training=bf16, layers=layers, **slots(kind))
    reference = copy.deepcopy(on_gpu).cpu().double()
    reference._hstu_transducer.layers = None
    reference.set_hammer_kernel(HammerKernel.PYTORCH)
    reference.set_training_dtype(torch.float64)
    reference._bf16_training = False
    collection = reference._embedding_collection
    collection._forward_hooks.clear()
    collection.register_forward_hook(in_dtype(torch.float64))
    return on_gpu, reference


# float32 through Triton uses TF32 products, an 11-bit mantissa as bf16 has 8.
@pytest.mark.parametrize(
    ("bf16", "tolerance"), [(True, 2.5e-2), (False, 4e-3)], ids=["bf16", "fp32"]
)
@pytest.mark.parametrize("kind", ["per_candidate", "shared_history", "pre", "stochastic", "none"])
@pytest.mark.parametrize("layers", ["host", "fused", "fused, recomputed"])
def test_triton_kernels_agree_with_the_float64_reference(
    layers: str, kind: str, bf16: bool, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if layers.endswith("recomputed"):
        monkeypatch.setattr(fused, "_MANY_ROWS", 0)
    on_gpu, reference = models(kind, bf16, layers.partition(",")[0])
    # Query times anywhere in the history: candidates of a user see different parts of it.
    outputs, gradients = step(on_gpu, batch(LENGTHS, CANDIDATES, later=False, device="cuda"))
    expected, expected_gradients = step(reference, batch(LENGTHS, CANDIDATES, later=False))
    errors = {
        name: relative_error(mine, reference)
        for name, mine, reference in zip(
            ("user", "item", "prediction"), outputs, expected, strict=True
        )
    }
    assert gradients.keys() == expected_gradients.keys()
    gradient_errors = {
        name: relative_error(gradients[name], reference)
        for name, reference in expected_gradients.items()
        if reference.abs().max() > 1e-9
    }
    worst = max(gradient_errors, key=lambda name: gradient_errors[name])
    # The host's own model under the same rounding, for scale.
    print(f"{kind} bf16={bf16}: {errors}, worst gradient {worst} {gradient_errors[worst]:.2e}")
    assert max(errors.values()) < tolerance
    assert gradient_errors[worst] < 4 * tolerance
    for value in (*outputs, *gradients.values()):
        assert torch.isfinite(value).all()


@pytest.mark.usefixtures("no_descriptors")
def test_empty_slots_are_the_host_to_the_last_bit() -> None:
    data = batch(LENGTHS, CANDIDATES, device="cuda")

    def steps(model_class: type, count: int) -> list[Any]:
        model = build_on_gpu(model_class, bf16_training=True)
        step(model, data)  # the first pass tries configurations, and kernels run many times
        return [step(model, data) for _ in range(count)]

    host, mine = steps(HostDlrmHSTU, 3), steps(DlrmHSTU, 3)
    for theirs, ours in zip(host[0][0], mine[0][0], strict=True):
        assert torch.equal(theirs, ours)
    assert mine[0][1].keys() == host[0][1].keys()
    repeated = 0
    for name in mine[0][1]:
        (first, *others), (ours, *ours_again) = (
            [gradients[name] for _, gradients in run] for run in (host, mine)
        )
        # Atomics give other bits every time, but may agree by chance in a few passes.
        spread = max(
            *(relative_error(other, first.cpu()) for other in others),
            *(relative_error(other, ours.cpu()) for other in ours_again),
        )
        repeated += spread == 0.0
        if spread == 0.0:
            assert torch.equal(ours, first), name
        else:
            assert relative_error(ours, first.cpu()) < 10 * spread, name
    # Those behind the attention's backward do not repeat: 21 of 73 do on an H200.
    assert repeated > 0


def recorded_passes(
    monkeypatch: pytest.MonkeyPatch, kind: str, *, layers: str | None = None, **changes: Any
) -> list[Any]:
    """Arguments and results of the fused layers in one step of a model."""
    passes: list[Any] = []
    original = fused.FusedLayers.run

    def record(of: Any, stack: Any, x: Tensor, sequences: Any, what: Any) -> Any:
        output = original(of, stack, x, sequences, what)
        passes.append(((of, stack, x.detach().requires_grad_(), sequences, what), output))
        return output

    monkeypatch.setattr(fused.FusedLayers, "run", record)
    model = build(
        DlrmHSTU,
        config=small_config(**{**vars(config()), **changes}),
        device="cuda",
        kernel=HammerKernel.TRITON,
        bf16_training=True,
        layers=layers,
        capture=False,
        **slots(kind),
    )
    step(model, batch(LENGTHS, CANDIDATES, later=False, device="cuda"))
    monkeypatch.setattr(fused.FusedLayers, "run", original)
    return passes


@pytest.mark.parametrize(
    ("kind", "most"), [("per_candidate", 40), ("shared_history", 60), ("stochastic", 60)]
)
def test_fused_layers_do_not_wait_for_the_device_and_launch_few_kernels(
    kind: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (((layers, stack, x, sequences, what), output),) = recorded_passes(monkeypatch, kind)
    assert output is not None
    parameters = list(stack.parameters())

    def one_pass() -> None:
        candidates = layers.run(stack, x, sequences, what)
        torch.autograd.grad(candidates, [x, *parameters], torch.ones_like(candidates))

    one_pass()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        one_pass()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        one_pass()
        torch.cuda.synchronize()
    on_device = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    print(f"{kind}: {len(on_device)} launches")
    assert len(on_device) <= most * len(stack._stu_layers)


def test_captured_steps_add_up_and_leave_evaluation_alone() -> None:
    """Batches of other sizes, evaluation in between, and gradients of two steps added up."""
    plain, captured = (
        build_on_gpu(
            DlrmHSTU, bf16_training=True, layers="fused", capture=capture, **slots("per_candidate")
        )
        for capture in (False, True)
    )
    captured.load_state_dict(plain.state_dict())
    for lengths, candidates in (
        (LENGTHS, CANDIDATES),
        (LENGTHS, CANDIDATES),
        ([40, 7, 64], [2, 2, 1]),
        (LENGTHS[:-1], CANDIDATES[:-1]),
    ):
        data = batch(lengths, candidates, seed=len(lengths), later=False, device="cuda")
        for model in (plain, captured):
            model.zero_grad(set_to_none=True)
            for _ in range(2):
                sum(model(*data)[2].values()).backward()
        mine, theirs = (
            {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            for model in (captured, plain)
        )
        assert mine.keys() == theirs.keys()
        for name, gradient in theirs.items():
            if gradient.abs().max() > 1e-9:
                assert relative_error(mine[name], gradient.cpu()) < 5e-2, name
        with torch.no_grad():
            error = relative_error(captured(*data)[3], plain(*data)[3].cpu())
        assert error < 2.5e-2
    assert captured._hstu_transducer.captured._function._graphs


def test_by_default_the_hosts_layers_run_what_the_kernels_cannot(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ((_, output),) = recorded_passes(monkeypatch, "per_candidate", hstu_group_norm=True)
    assert output is None
    with pytest.raises(HpgrError, match=r"hpgr\.DlrmHSTU\.layers.*head size"):
        recorded_passes(monkeypatch, "none", hstu_attn_qk_dim=24, layers="fused")


def test_cached_inference_agrees_on_the_device() -> None:
    hook = PreferenceGuidedSparseAttention(top_k=4, sigma=1.0, layout="shared_history")
    model = build(
        DlrmHSTU,
        config=config(),
        device="cuda",
        kernel=HammerKernel.TRITON,
        attention_hook=hook,
    ).eval()
    stack = model._hstu_transducer._stu_module
    lengths = torch.tensor([60, 5, 0], device="cuda")
    targets = torch.full_like(lengths, 3)
    raw = {
        "history_embeddings": torch.randn(65, 8, device="cuda"),
        "candidate_embeddings": torch.randn(9, 8, device="cuda"),
    }
    full = lengths + 2 + targets
    offsets = torch.nn.functional.pad(full.cumsum(0), (1, 0))
    x = torch.randn(int(full.sum()), WIDTH, device="cuda")
    places = [torch.arange(int(n), device="cuda") for n in full]
    is_candidate = torch.cat([p >= n - 3 for p, n in zip(places, full, strict=True)])
    with torch.no_grad():
        primed = lengths + 2
        stack(
            x=x[~is_candidate],
            x_lengths=primed,
            x_offsets=torch.nn.functional.pad(primed.cumsum(0), (1, 0)),
            max_seq_len=int(full.max()),
            num_targets=torch.zeros_like(lengths),
            max_kv_caching_len=int(primed.max()),
            kv_caching_lengths=primed,
        )
        with model.cached_preferences(**raw, history_lengths=lengths, num_candidates=targets):
            cached = stack.cached_forward(x[is_candidate], targets)
            whole = stack(
                x=x,
                x_lengths=full,
                x_offsets=offsets,
                max_seq_len=int(full.max()),
                num_targets=targets,
            )[is_candidate]
    assert relative_error(cached, whole.cpu()) < 4e-3
