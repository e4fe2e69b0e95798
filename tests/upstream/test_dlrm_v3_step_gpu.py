"""What a training step with slots costs beside its arithmetic: waits for the device, launches.

Also that places given by hand are the host's own, in the host's Triton kernel.
"""

import warnings
from typing import Any

import pytest
import torch
from generative_recommenders.common import HammerKernel
from generative_recommenders.modules.dlrm_hstu import DlrmHSTU as HostDlrmHSTU
from small_ranker import TABLE_DIM, WIDTH, batch, build, small_config, step

from hpgr_plugin.components.attention_hooks import PreferenceGuidedSparseAttention
from hpgr_plugin.components.positions import TimeAwarePositionalEncoder
from hpgr_plugin.components.sem import SessionEnhancementModule
from hpgr_plugin.hosts.dlrm_v3 import DlrmHSTU, attention
from hpgr_plugin.hosts.dlrm_v3.positions import PlacedHSTUPositionalEncoder
from hpgr_plugin.hosts.dlrm_v3.selection import FullPlaces
from hpgr_plugin.ops.compact.parts import sequence_parts

pytestmark = [
    pytest.mark.upstream,
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.usefixtures("few_configurations", "no_descriptors"),
]

HEAD_DIM = 32
LENGTHS = [190, 7, 3, 64, 131, 250, 33, 1]
ONE_EACH, SEVERAL = [1] * 8, [4, 1, 2, 3, 4, 2, 1, 3]
WARM_UP = 12  # times are checked in the first ten batches


def make(model_class: type, **slots: Any) -> Any:
    config = small_config(
        max_seq_len=512,
        hstu_attn_linear_dim=HEAD_DIM,
        hstu_attn_qk_dim=HEAD_DIM,
        hstu_transducer_embedding_dim=2 * HEAD_DIM,
    )
    return build(
        model_class,
        config=config,
        device="cuda",
        kernel=HammerKernel.TRITON,
        bf16_training=True,
        **slots,
    )


def slots(layout: str) -> dict[str, Any]:
    hook = PreferenceGuidedSparseAttention(top_k=4, sigma=1.0, recent=8, layout=layout)
    encoder = TimeAwarePositionalEncoder(embedding_dim=2 * HEAD_DIM, max_positions=512)
    return {"attention_hook": hook, "positional_encoder": encoder}


def waits(model: Any, data: Any) -> list[str]:
    """Where one step waits for the device."""
    for _ in range(WARM_UP):
        step(model, data)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step(model, data)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [f"{w.filename}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]


def launches(model: Any, data: Any) -> int:
    """Kernels of one step."""
    for _ in range(WARM_UP):
        step(model, data)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step(model, data)
        torch.cuda.synchronize()
    return sum(e.device_type == torch.autograd.DeviceType.CUDA for e in profile.events())


@pytest.mark.parametrize("layout", ["per_candidate", "shared_history"])
@pytest.mark.parametrize(
    ("candidates", "more"),
    # The number of kept rows has to be known; with several candidates of a user also how many of
    # them are different ones.
    [(ONE_EACH, 1), (SEVERAL, 2)],
    ids=["one-each", "several"],
)
def test_filled_slots_wait_no_more_than_they_must(
    layout: str, candidates: list[int], more: int
) -> None:
    data = batch(LENGTHS, candidates, device="cuda")
    plain = make(DlrmHSTU, capture=False, **slots(layout))
    host, mine = waits(make(HostDlrmHSTU), data), waits(plain, data)
    allowed = len(host) + (more if layout == "per_candidate" else 1)
    assert len(mine) <= allowed, f"host: {host}\nmine: {mine}"


@pytest.mark.parametrize("layout", ["per_candidate", "shared_history"])
def test_filled_slots_add_at_most_a_hundred_launches(layout: str) -> None:
    data = batch(LENGTHS, ONE_EACH, device="cuda")
    plain = make(DlrmHSTU, capture=False, **slots(layout))
    host, mine = launches(make(HostDlrmHSTU), data), launches(plain, data)
    print(f"host {host}, {layout} {mine}")
    assert mine <= host + 100


def assert_close_in_norm(got: torch.Tensor, wanted: torch.Tensor, name: str) -> None:
    """Of bfloat16 steps that add up in another order."""
    error = (got.float() - wanted.float()).norm()
    assert error <= 5e-2 * wanted.float().norm() + 1e-4, name


CAPTURED = ["hook", "positions", "sem"]


def captured_slots(kind: str, layout: str) -> dict[str, Any]:
    torch.manual_seed(3)
    filled = slots(layout)
    if kind == "hook":
        del filled["positional_encoder"]
    if kind == "sem":
        filled["sem"] = SessionEnhancementModule(embedding_dim=TABLE_DIM, num_heads=2)
    return filled


@pytest.mark.parametrize(
    ("layout", "candidates"),
    [("per_candidate", ONE_EACH), ("per_candidate", SEVERAL), ("shared_history", SEVERAL)],
    ids=["one-each", "several", "shared"],
)
@pytest.mark.parametrize("kind", CAPTURED)
def test_captured_steps_are_the_steps(kind: str, layout: str, candidates: list[int]) -> None:
    plain = make(DlrmHSTU, capture=False, **captured_slots(kind, layout))
    mine = make(DlrmHSTU, **captured_slots(kind, layout))
    optimizers = [torch.optim.SGD(model.parameters(), lr=1e-2) for model in (plain, mine)]
    graphs = mine._hstu_transducer.captured._function._graphs
    for seed in (0, 1, 0, 2, 1, 0):  # shared histories are captured when sizes come again
        lengths = [n + seed for n in LENGTHS]
        data = batch(lengths, candidates, seed=seed, device="cuda")
        reference, got = step(plain, data), step(mine, data)
        for a, b in zip(got[0], reference[0], strict=True):
            torch.testing.assert_close(a.float(), b.float(), rtol=2e-2, atol=2e-2)
        assert got[1].keys() == reference[1].keys()
        for name, wanted in reference[1].items():
            assert_close_in_norm(got[1][name], wanted, name)
        for optimizer in optimizers:
            optimizer.step()
    assert 1 <= len(graphs) <= 4


@pytest.mark.parametrize("layout", ["per_candidate", "shared_history"])
def test_captured_steps_wait_no_more_than_the_others(layout: str) -> None:
    data = batch(LENGTHS, ONE_EACH, device="cuda")
    mine = make(DlrmHSTU, **slots(layout))
    assert len(waits(mine, data)) <= len(waits(make(HostDlrmHSTU), data)) + 1
    assert mine._hstu_transducer.captured._function._graphs


def test_empty_slots_add_no_launch() -> None:
    data = batch(LENGTHS, ONE_EACH, device="cuda")
    assert launches(make(DlrmHSTU), data) == launches(make(HostDlrmHSTU), data)


@pytest.mark.parametrize("count", [10, 64])
def test_many_candidates_take_no_more_memory_than_the_host(count: int) -> None:
    """Sizes at which the layers make their projections again in the backward."""
    users, length = 96, 1024 - count
    data = batch([length] * users, [count] * users, device="cuda")

    def peak(model_class: type, **filled: Any) -> float:
        config = small_config(
            max_seq_len=1024,
            max_num_candidates=count,
            hstu_attn_linear_dim=64,
            hstu_attn_qk_dim=64,
            hstu_transducer_embedding_dim=128,
        )
        kernel = HammerKernel.TRITON
        model = build(
            model_class, config=config, device="cuda", kernel=kernel, bf16_training=True, **filled
        )
        step(model, data)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(model, data)
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    host = peak(HostDlrmHSTU)
    hook = PreferenceGuidedSparseAttention(top_k=8, recent=32)
    mine = peak(DlrmHSTU, attention_hook=hook, capture=False)
    print(f"host {host:.0f} MiB, auto {mine:.0f} MiB")
    assert mine < 1.05 * host


@pytest.mark.parametrize("layout", ["per_candidate", "shared_history"])
def test_the_hosts_layers_make_their_projections_again(
    monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    data, results = batch(LENGTHS, SEVERAL, device="cuda"), []
    for least in (2**16, 0):
        monkeypatch.setattr(attention, "_ROWS_TO_RECOMPUTE", least)
        results.append(step(make(DlrmHSTU, layers="host", **slots(layout)), data))
    for name, wanted in results[0][1].items():
        assert_close_in_norm(results[1][1][name], wanted, name)


def test_places_are_those_of_the_hosts_kernel() -> None:
    torch.manual_seed(0)
    encoder = PlacedHSTUPositionalEncoder(
        num_position_buckets=64,
        num_time_buckets=2048,
        embedding_dim=WIDTH,
        contextual_seq_len=2,
        is_inference=False,
    ).cuda()
    encoder.set_hammer_kernel(HammerKernel.TRITON)
    counts = torch.tensor([2, 1, 3], device="cuda")
    lengths = torch.tensor([90, 0, 30], device="cuda") + counts + 2
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    total = int(offsets[-1])
    inputs = {
        "max_seq_len": int(lengths.max()),
        "seq_lengths": lengths,
        "seq_offsets": offsets,
        "seq_timestamps": torch.randint(0, 10**6, (total,), device="cuda"),
        "seq_embeddings": torch.randn(total, WIDTH, device="cuda", requires_grad=True),
        "num_targets": counts,
    }
    parts = sequence_parts(offsets, counts, contextual_len=2, total_rows=total)
    rows = torch.arange(parts.num_history, device="cuda")
    grad = torch.randn(total, WIDTH, device="cuda")
    results = []
    for places in (None, FullPlaces(parts, rows, parts.history_offsets)):
        encoder.places = places
        encoded = encoder(**inputs)
        wanted = [inputs["seq_embeddings"], *encoder.parameters()]
        results.append([encoded, *torch.autograd.grad(encoded, wanted, grad)])
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
