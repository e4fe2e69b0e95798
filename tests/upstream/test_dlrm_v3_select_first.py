"""Selecting before the preprocessing gives what selecting behind it gives, value and gradient.

The reference encodes whole histories with the host's preprocessor and positional encoder, and
gathers the planned rows of the result.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from generative_recommenders.modules import stu
from generative_recommenders.modules.dlrm_hstu import DlrmHSTU as HostDlrmHSTU
from generative_recommenders.ops import hstu_attention as stu_attention
from small_ranker import (
    CONTEXT,
    TABLE_DIM,
    WIDTH,
    assert_same_step,
    batch,
    build,
    small_config,
    step,
)

from hpgr_plugin.components.attention_hooks import PreferenceGuidedSparseAttention, StochasticLength
from hpgr_plugin.components.positions import TimeAwarePositionalEncoder
from hpgr_plugin.components.sem import SessionEnhancementModule
from hpgr_plugin.errors import HpgrError
from hpgr_plugin.hosts.dlrm_v3 import DlrmHSTU, attention
from hpgr_plugin.hosts.dlrm_v3.attention import RowSequences, StepAttention
from hpgr_plugin.hosts.dlrm_v3.modules import PreferenceTransducer
from hpgr_plugin.hosts.dlrm_v3.request import Request
from hpgr_plugin.hosts.dlrm_v3.selection import RankingBatch
from hpgr_plugin.ops.compact.parts import joined_parts, short_sequences

pytestmark = [pytest.mark.upstream, pytest.mark.usefixtures("float64_operators")]

SHAPES = {
    "several": ([7, 1, 0, 12], [2, 1, 3, 2]),
    "one-each": ([7, 1, 0, 12], [1, 1, 1, 1]),
    "none-for-some": ([5, 3, 9], [1, 0, 1]),
    "long": ([40, 3], [1, 4]),
    "no-history": ([0, 0], [1, 1]),
}


class EncodeFirst(DlrmHSTU):
    """The same slots, with the selection behind the preprocessing."""

    def main_forward(self, *args: Any, **kwargs: Any) -> Any:
        data = RankingBatch(*args, **kwargs)
        plan, hook = self._plan(data), self.attention_hook
        assert hook is not None
        times, query_times = self.features.times(data)
        parts = joined_parts(
            data.history_offsets,
            data.candidate_offsets,
            contextual_len=self.features.contextual_len,
            num_history=len(times),
            num_candidates=len(query_times),
        )
        most = data.max_num_candidates
        request = Request(parts, plan, most, hook.layout, hook.mask_position, self._hide_future)
        with self._hstu_transducer.requested(request):
            return HostDlrmHSTU.main_forward(self, **data._asdict())


def gather_per_user(
    transducer: Any,
    request: Request,
    *,
    max_seq_len: int,
    seq_timestamps: Any,
    seq_embeddings: Any,
    **_: Any,
) -> Any:
    """Sequences shortened once per user, out of encoded rows."""
    rows = short_sequences(request.parts, request.plan, per_user=True)
    lengths = rows.lengths
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    parts = dataclasses.replace(
        request.parts,
        seq_offsets=offsets,
        history_offsets=request.plan.offsets,
        num_history=len(request.plan.index),
    )
    short = dataclasses.replace(request, parts=parts)
    sequences = RowSequences(parts, lengths, rows.num_targets, rows.max_len, request.max_targets)
    step_attention = StepAttention(
        column_weights=rows.weights,
        norm_ratio=rows.max_len / max_seq_len,
        candidates=transducer._candidate_mask(short, None, seq_timestamps[rows.index]),
    )
    return transducer.run_layers(seq_embeddings[rows.index], sequences, step_attention)


FEW: dict[str, Any] = {"top_k": 2, "sigma": 1.0, "layout": "per_candidate"}
HOOKS: dict[str, Callable[[], Any]] = {
    "post": lambda: PreferenceGuidedSparseAttention(**FEW, recent=1),
    "pre": lambda: PreferenceGuidedSparseAttention(**FEW, mask_position="pre"),
    "stochastic": lambda: StochasticLength(alpha=1.2, max_history=20),
    "shared": lambda: PreferenceGuidedSparseAttention(**{**FEW, "layout": "shared_history"}),
}


def slots(*, positions: str, sem: bool, hide_future: bool) -> dict[str, Any]:
    filled: dict[str, Any] = {"hide_future": hide_future}
    if positions == "time-aware":
        filled["positional_encoder"] = TimeAwarePositionalEncoder(
            embedding_dim=WIDTH, max_positions=64, hide_future=hide_future
        )
    if sem:
        filled["sem"] = SessionEnhancementModule(
            embedding_dim=TABLE_DIM, num_heads=2, gap_seconds=2_000
        )
        with torch.no_grad():
            filled["sem"].gate.fill_(0.3)
    return filled


def both_orders(
    monkeypatch: pytest.MonkeyPatch, data: Any, hook: str, **settings: Any
) -> tuple[Any, Any]:
    config = settings.pop("config", {})
    results = []
    for model_class in (EncodeFirst, DlrmHSTU):
        torch.manual_seed(1)
        model = build(
            model_class,
            dtype=torch.float64,
            config=small_config(**config),
            attention_hook=HOOKS[hook](),
            **slots(**settings),
        )
        if hook == "stochastic" and model_class is EncodeFirst:
            computed = PreferenceTransducer._hstu_compute

            def compute(self: Any, **inputs: Any) -> Any:
                return gather_per_user(self, self._request, **inputs)

            monkeypatch.setattr(PreferenceTransducer, "_hstu_compute", compute)
            results.append(step(model, data))
            monkeypatch.setattr(PreferenceTransducer, "_hstu_compute", computed)
        else:
            results.append(step(model, data))
    return results[0], results[1]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("positions", ["host", "time-aware"])
@pytest.mark.parametrize("hook", ["post", "pre", "stochastic"])
def test_the_order_makes_no_difference(
    monkeypatch: pytest.MonkeyPatch, hook: str, positions: str, shape: Any
) -> None:
    data = batch(*shape, later=False)
    settings = {"positions": positions, "sem": positions == "host", "hide_future": True}
    assert_same_step(*both_orders(monkeypatch, data, hook, **settings))


@pytest.mark.parametrize("positions", ["host", "time-aware"])
def test_nor_without_hidden_future(monkeypatch: pytest.MonkeyPatch, positions: str) -> None:
    data = batch([7, 1, 12], [1, 1, 1], later=False)
    settings = {"positions": positions, "sem": True, "hide_future": False}
    assert_same_step(*both_orders(monkeypatch, data, "post", **settings))


def test_contextual_features_count_by_the_full_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first history is long enough only before it is shortened."""
    data = batch([12, 2], [1, 2], later=False)
    config = {"contextual_feature_to_min_uih_length": {next(iter(CONTEXT)): 10}}
    settings = {"positions": "host", "sem": False, "hide_future": False, "config": config}
    expected, mine = both_orders(monkeypatch, data, "post", **settings)
    assert_same_step(expected, mine)
    users = mine[1]["_embedding_collection.embeddings.user_table.weight"].abs().sum(1)
    assert int((users > 0).sum()) == 1


def test_the_host_reads_only_what_is_kept() -> None:
    model = build(DlrmHSTU, attention_hook=HOOKS["post"]())
    seen: dict[str, Any] = {}
    model._hstu_transducer._input_preprocessor.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    model(*batch([40, 3], [1, 1]))
    kept = len(seen["seq_embeddings"]) - 2
    assert kept < 20
    assert len(seen["seq_payloads"]["action"]) == kept
    assert len(seen["seq_payloads"]["category"]) == kept + 2
    assert len(seen["seq_timestamps"]) == kept + 2


def test_an_encoder_that_numbers_whole_histories_is_an_error() -> None:
    class Own(torch.nn.Module):
        pass

    model = build(DlrmHSTU, attention_hook=HOOKS["post"]())
    model._hstu_transducer._positional_encoder = Own()
    with pytest.raises(HpgrError, match=r"class Own.*hpgr\.DlrmHSTU\.positional_encoder"):
        model(*batch([4], [1]))


LAYOUTS: dict[str, dict[str, Any]] = {
    "per_candidate": {"attention_hook": "post"},
    "shared_history": {"attention_hook": "shared"},
    "positions": {},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_that_are_made_again_in_the_backward(
    monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    data = batch([9, 4], [2, 1], later=False)
    results = []
    for least in (2**16, 0):
        monkeypatch.setattr(attention, "_ROWS_TO_RECOMPUTE", least)
        model = build(DlrmHSTU, dtype=torch.float64, **filled(layout))
        results.append(step(model, data))
    assert_same_step(*results)


class _ReadsTwice(torch.autograd.Function):
    """Asks for what it saved twice, once in inference mode, as the host's Triton attention does."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            (x,) = ctx.saved_tensors
        assert not x.is_inference()
        assert torch.equal(x, ctx.saved_tensors[0])
        return grad.clone()


def test_rows_are_made_again_for_the_hosts_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = batch([9, 4], [2, 1], later=False)
    attend = attention.hstu_mha
    expected = step(build(DlrmHSTU, dtype=torch.float64, **filled("per_candidate")), data)
    monkeypatch.setattr(attention, "_ROWS_TO_RECOMPUTE", 0)
    monkeypatch.setattr(
        attention,
        "hstu_mha",
        lambda **arguments: _ReadsTwice.apply(attend(**arguments)),
    )
    model = build(DlrmHSTU, dtype=torch.float64, **filled("per_candidate"))
    assert_same_step(expected, step(model, data))


class Wrapped(torch.nn.Module):
    """A stack inside another module, which this package does not look into."""

    def __init__(self, stack: torch.nn.Module) -> None:
        super().__init__()
        self.stack = stack

    def forward(self, **inputs: Any) -> torch.Tensor:
        return self.stack(**inputs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_stack_in_a_wrapper_gives_the_same(layout: str) -> None:
    data = batch([9, 4], [1, 1], later=False)
    predictions = []
    for wrap in (False, True):
        model = build(DlrmHSTU, dtype=torch.float64, **filled(layout))
        if wrap:
            model._hstu_transducer._stu_module = Wrapped(model._hstu_transducer._stu_module)
        predictions.append(model(*data)[3])
    torch.testing.assert_close(predictions[0], predictions[1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_hosts_fused_layer_is_left_alone(monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    """On Hopper it reads wrong rows; a patched host's `value_scale` does not take it either."""
    fused = stu.hstu_preprocess_and_attention

    def only_scaled(*args: Any, **kwargs: Any) -> Any:
        assert kwargs.get("value_scale") is not None
        return fused(*args, **kwargs)

    monkeypatch.setattr(stu, "hstu_preprocess_and_attention", only_scaled)
    step(build(DlrmHSTU, **filled(layout)), batch([9, 4], [2, 1], later=False))
    # The attention by itself takes descriptors only where it is asked to.
    assert inspect.signature(stu_attention.hstu_mha).parameters["enable_tma"].default is False


def filled(layout: str) -> dict[str, Any]:
    torch.manual_seed(1)
    made = {name: HOOKS[hook]() for name, hook in LAYOUTS[layout].items()}
    encoder = TimeAwarePositionalEncoder(embedding_dim=WIDTH, max_positions=64)
    return {**made, "positional_encoder": encoder}
