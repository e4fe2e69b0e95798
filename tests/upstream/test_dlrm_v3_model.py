"""The slots of the ranking adapter in the host's model, on CPU through its PyTorch kernels."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import gin
import pytest
import torch
from generative_recommenders.modules.dlrm_hstu import DlrmHSTU as HostDlrmHSTU
from small_ranker import (
    NUM_ITEMS,
    TABLE_DIM,
    WIDTH,
    batch,
    build,
    only_user,
    recorded_lengths,
    small_config,
    step,
)

from hpgr_plugin.components.attention_hooks import PreferenceGuidedSparseAttention, StochasticLength
from hpgr_plugin.components.positions import TimeAwarePositionalEncoder
from hpgr_plugin.components.sem import SessionEnhancementModule
from hpgr_plugin.config.registry import configured
from hpgr_plugin.errors import HpgrError
from hpgr_plugin.hosts.dlrm_v3 import DlrmHSTU

pytestmark = [pytest.mark.upstream, pytest.mark.usefixtures("float64_operators")]

LENGTHS, CANDIDATES = [7, 1, 0, 12], [2, 1, 3, 2]


def everything(layout: str = "per_candidate", **settings: Any) -> PreferenceGuidedSparseAttention:
    """A hook that keeps the whole history with weight 1."""
    return PreferenceGuidedSparseAttention(top_k=10_000, layout=layout, **settings)


def with_weights_of(model: Any, other: Any) -> Any:
    """`model` with every weight that `other` has under the same name."""
    missing, unexpected = model.load_state_dict(other.state_dict(), strict=False)
    assert not unexpected
    assert not missing
    return model


def assert_same(first: Any, second: Any, **tolerance: float) -> None:
    for mine, theirs in zip(first[0], second[0], strict=True):
        torch.testing.assert_close(mine, theirs, **tolerance)
    assert first[1].keys() == second[1].keys()
    for name in first[1]:
        torch.testing.assert_close(
            first[1][name], second[1][name], msg=lambda m, n=name: f"{n}: {m}", **tolerance
        )


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_empty_slots_are_the_host_to_the_last_bit(dropout: float) -> None:
    changes = {"hstu_input_dropout_ratio": dropout, "hstu_linear_dropout_rate": dropout}
    data = batch(LENGTHS, CANDIDATES)
    results = []
    for model_class in (HostDlrmHSTU, DlrmHSTU):
        model = build(model_class, config=small_config(**changes))
        torch.manual_seed(3)
        results.append(step(model, data))
    assert_same(results[0], results[1], rtol=0.0, atol=0.0)


@pytest.mark.parametrize("layout", ["per_candidate", "shared_history"])
@pytest.mark.parametrize("mask_position", ["post", "pre"])
def test_a_plan_that_keeps_everything_changes_nothing(layout: str, mask_position: str) -> None:
    data = batch(LENGTHS, CANDIDATES)
    dense = build(DlrmHSTU, dtype=torch.float64)
    hooked = build(
        DlrmHSTU,
        dtype=torch.float64,
        attention_hook=everything(layout, mask_position=mask_position),
    )
    # The host rounds its layer norms to float32.
    assert_same(
        step(hooked, data), step(with_weights_of(dense, hooked), data), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("layout", ["per_candidate", "shared_history"])
def test_dropped_history_gets_no_gradient_and_contextual_tokens_do(layout: str) -> None:
    hook = PreferenceGuidedSparseAttention(top_k=1, sigma=0.1, layout=layout)
    model = build(DlrmHSTU, attention_hook=hook)
    uih, offered = batch([12], [1])
    _, gradients = step(model, (uih, offered))
    items = uih["item"].values()
    rows = gradients["_embedding_collection.embeddings.item_table.weight"].abs().sum(1)
    touched = int((rows[items.unique()] > 0).sum())
    kept = 1 + int(offered["candidate_item"].values()[0] in items)
    if layout == "per_candidate":
        assert touched <= kept
    else:  # the kept row has seen the rows before it
        assert touched >= 1
    assert gradients["_embedding_collection.embeddings.user_table.weight"].abs().sum() > 0
    assert gradients["_embedding_collection.embeddings.country_table.weight"].abs().sum() > 0


@pytest.mark.parametrize("layout", ["per_candidate", "shared_history"])
def test_candidates_do_not_depend_on_each_other_or_on_the_batch(layout: str) -> None:
    hook = PreferenceGuidedSparseAttention(top_k=3, sigma=1.0, recent=1, layout=layout)
    # One length for all: the host divides by the longest sequence of the batch.
    model = build(DlrmHSTU, dtype=torch.float64, attention_hook=hook).eval()
    together = batch([9, 9], [2, 2])
    both = model(*together)[3]
    per_user = [only_user(together, user) for user in (0, 1)]
    alone = torch.cat([model(*data)[3] for data in per_user], dim=1)
    torch.testing.assert_close(both, alone, rtol=1e-6, atol=1e-7)


def assert_the_future_is_hidden(model: Any) -> None:
    """Other items at or after the query times change no prediction."""
    uih, offered = batch([14], [3], later=False)
    changed = copy.deepcopy(uih)
    future = uih["time"].values() >= offered["candidate_time"].values().max()
    assert future.any()
    # values() of a copy shares no memory with `uih`; the flat values are key after key.
    flat, offset = changed.values(), uih.offset_per_key()[0]
    flat[offset : offset + 14][future] = (flat[offset : offset + 14][future] + 7) % NUM_ITEMS
    before, after = model(uih, offered)[3], model(changed, offered)[3]
    torch.testing.assert_close(before, after, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "hook",
    [
        lambda: everything("per_candidate"),
        lambda: everything("shared_history"),
        lambda: None,
        lambda: StochasticLength(alpha=2.0, max_history=10_000),
    ],
    ids=["per_candidate", "shared_history", "none", "stochastic-length"],
)
def test_the_future_of_a_candidate_is_hidden_from_it(hook: Callable[[], Any]) -> None:
    """What happens at or after a query time has no influence on that candidate's prediction."""
    encoder = TimeAwarePositionalEncoder(embedding_dim=WIDTH, max_positions=64)
    model = build(DlrmHSTU, dtype=torch.float64, attention_hook=hook(), positional_encoder=encoder)
    assert_the_future_is_hidden(model)


@pytest.mark.parametrize("layout", ["per_candidate", "shared_history"])
def test_without_hide_future_a_candidate_sees_the_whole_history(layout: str) -> None:
    data = batch(LENGTHS, CANDIDATES, later=False)
    hooked = build(
        DlrmHSTU, dtype=torch.float64, attention_hook=everything(layout), hide_future=False
    )
    host = with_weights_of(build(HostDlrmHSTU, dtype=torch.float64), hooked)
    torch.testing.assert_close(hooked(*data)[3], host(*data)[3], rtol=1e-5, atol=1e-6)
    hidden = build(DlrmHSTU, dtype=torch.float64, attention_hook=everything(layout))
    assert not torch.allclose(hidden(*data)[3], host(*data)[3], rtol=1e-4)


@pytest.mark.parametrize("encoder_hides", [True, False])
def test_the_positional_encoder_says_whether_the_future_is_hidden(encoder_hides: bool) -> None:
    encoder = TimeAwarePositionalEncoder(
        embedding_dim=WIDTH, max_positions=64, hide_future=encoder_hides
    )
    model = build(DlrmHSTU, attention_hook=everything(), positional_encoder=encoder)
    lengths = recorded_lengths(model)
    uih, offered = batch([14, 9], [1, 1], later=False)
    model(uih, offered)
    first_query, second_query = offered["candidate_time"].values()
    times = uih["time"].values()
    earlier = [int((times[:14] < first_query).sum()), int((times[14:] < second_query).sum())]
    assert earlier != [14, 9]
    kept = earlier if encoder_hides else [14, 9]
    assert lengths == [[n + 3 for n in kept]]  # and two contextual tokens and the candidate


def test_sem_with_its_gate_closed_is_the_host_and_opens_with_training() -> None:
    data = batch(LENGTHS, CANDIDATES)
    sem = SessionEnhancementModule(embedding_dim=TABLE_DIM, num_heads=2)
    model = build(DlrmHSTU, dtype=torch.float64, sem=sem)
    host = build(HostDlrmHSTU, dtype=torch.float64)
    renamed = {
        name.replace("_input_preprocessor._preprocessor.", "_input_preprocessor."): value
        for name, value in model.state_dict().items()
        if ".sem." not in name
    }
    host.load_state_dict(renamed)
    outputs, gradients = step(model, data)
    expected, _ = step(host, data)
    for mine, theirs in zip(outputs, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
    gate = "_hstu_transducer._input_preprocessor.sem.gate"
    assert gradients[gate].abs().sum() > 0
    with torch.no_grad():
        model.sem.gate.fill_(1.0)
    assert not torch.allclose(model(*data)[3], outputs[2])


def test_sem_touches_history_rows_alone() -> None:
    class Shift(SessionEnhancementModule):
        def forward(self, embeddings, offsets, timestamps):  # type: ignore[no-untyped-def]
            self.seen = (embeddings.shape[0], offsets.tolist(), timestamps.tolist())
            return embeddings + 1.0

    sem = Shift(embedding_dim=TABLE_DIM)
    model = build(DlrmHSTU, sem=sem)
    received = {}
    preprocessor = model._hstu_transducer._input_preprocessor._preprocessor
    preprocessor.register_forward_pre_hook(
        lambda _, args, kwargs: received.update(kwargs), with_kwargs=True
    )
    uih, offered = batch(LENGTHS, CANDIDATES)
    model(uih, offered)
    assert sem.seen == (20, [0, 7, 8, 8, 20], uih["time"].values().tolist())
    table = model._embedding_collection.embeddings["item_table"].weight
    start = 0
    for user, (n, c) in enumerate(zip(LENGTHS, CANDIDATES, strict=True)):
        rows = received["seq_embeddings"][start : start + n + c]
        history = slice(sum(LENGTHS[:user]), sum(LENGTHS[: user + 1]))
        shown = slice(sum(CANDIDATES[:user]), sum(CANDIDATES[: user + 1]))
        torch.testing.assert_close(rows[:n], table[uih["item"].values()[history]] + 1.0)
        torch.testing.assert_close(rows[n:], table[offered["candidate_item"].values()[shown]])
        start += n + c


@pytest.mark.parametrize("hook", [everything, lambda: None], ids=["hook", "positions"])
def test_candidates_that_see_nothing_of_their_history_stop_the_run(hook: Callable[[], Any]) -> None:
    """As with a reader that gives every item and candidate the same time."""
    encoder = TimeAwarePositionalEncoder(embedding_dim=WIDTH, max_positions=64)
    slots = {"attention_hook": hook(), "positional_encoder": encoder}
    uih, offered = batch(LENGTHS, CANDIDATES)
    offered["candidate_time"].values().zero_()
    uih["time"].values().zero_()
    model = build(DlrmHSTU, **slots)
    for _ in range(9):
        model(uih, offered)
    with pytest.raises(HpgrError, match=r"100%.*'candidate_time'.*DlrmHSTU.hide_future = False"):
        model(uih, offered)
    for settings in ({"hide_future": False}, {"max_blind_share": 1.0}):
        model = build(DlrmHSTU, attention_hook=everything(), **settings)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(20):
                model(uih, offered)
        said = [w for w in caught if "see none of it" in str(w.message)]
        assert len(said) == ("max_blind_share" in settings)


@pytest.mark.parametrize("slot", ["sem", "positional_encoder"])
def test_histories_out_of_order_are_said_with_what_to_do(slot: str) -> None:
    components = {
        "sem": SessionEnhancementModule(embedding_dim=TABLE_DIM),
        "positional_encoder": TimeAwarePositionalEncoder(embedding_dim=WIDTH, max_positions=64),
    }
    model = build(DlrmHSTU, **{slot: components[slot]})
    uih, offered = batch(LENGTHS, CANDIDATES)
    uih["time"].values().copy_(uih["time"].values().flip(0))
    with pytest.raises(
        HpgrError, match=r"time must ascend in every row.*debug.*sort every history"
    ):
        model(uih, offered)


def test_times_in_milliseconds_are_warned_of_once() -> None:
    model = build(DlrmHSTU, sem=SessionEnhancementModule(embedding_dim=TABLE_DIM))
    uih, offered = batch(LENGTHS, CANDIDATES)
    uih["time"].values().add_(1_700_000_000_000)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            model(uih, offered)
    assert len([w for w in caught if "milliseconds?" in str(w.message)]) == 1


def test_sem_shows_a_candidate_nothing_of_its_future() -> None:
    """The snippet needs no line for it: without `causal` the host decides."""
    sem = SessionEnhancementModule(embedding_dim=TABLE_DIM, num_heads=2, gap_seconds=60)
    model = build(DlrmHSTU, dtype=torch.float64, attention_hook=everything(), sem=sem)
    assert sem.causal
    with torch.no_grad():
        model.sem.gate.fill_(0.5)
    assert_the_future_is_hidden(model)


def test_sem_over_the_whole_history_needs_a_log_without_query_times() -> None:
    def built(**arguments: Any) -> Any:
        sem = SessionEnhancementModule(embedding_dim=TABLE_DIM, num_heads=2, **arguments)
        return lambda **slots: build(DlrmHSTU, sem=sem, **slots)

    with pytest.raises(ValueError, match=r"causal must be True or None here.*hide_future is True"):
        built(causal=False)()
    assert built(causal=False)(hide_future=False).sem.causal is False
    assert built()(hide_future=False).sem.causal is False
    assert built(causal=True)(hide_future=False).sem.causal is True


def test_time_aware_encoder_numbers_every_candidate_by_its_own_time() -> None:
    encoder = TimeAwarePositionalEncoder(embedding_dim=WIDTH, max_positions=64)
    model = build(DlrmHSTU, positional_encoder=encoder)
    wrapped = model._hstu_transducer._positional_encoder
    seq_lengths = torch.tensor([2 + 3 + 2, 2 + 0 + 1])  # contextual, history, candidates
    times = torch.tensor([0, 0, 10, 20, 30, 25, 5, 0, 0, 7])
    embeddings = torch.randn(10, WIDTH)
    encoded = wrapped(
        max_seq_len=7,
        seq_lengths=seq_lengths,
        seq_offsets=torch.tensor([0, 7, 10]),
        seq_timestamps=times,
        seq_embeddings=embeddings,
        num_targets=torch.tensor([2, 1]),
    )
    added = encoded - embeddings * WIDTH**0.5
    table = encoder.table.weight
    # History 1, 2, 3; the candidate of time 25 is third, that of time 5 first; alone: first.
    expected = torch.zeros(10, WIDTH)
    for row, index in {2: 1, 3: 2, 4: 3, 5: 3, 6: 1, 9: 1}.items():
        expected[row] = table[index - 1].detach()
    torch.testing.assert_close(added, expected, rtol=1e-5, atol=1e-5)
    assert wrapped.contextual_weight.shape == (2, WIDTH)


def test_stochastic_length_shortens_in_training_only() -> None:
    data = batch([40, 3], [2, 2])
    hook = StochasticLength(alpha=1.2, selection="recent", max_history=40)
    model = build(DlrmHSTU, dtype=torch.float64, attention_hook=hook)
    lengths = recorded_lengths(model)
    while lengths.count([40 + 4, 3 + 4]) == len(lengths):  # both outcomes have a chance
        _, gradients = step(model, data)
        assert len(lengths) < 50
    assert lengths[-1] == [int(40**0.6) + 4, 3 + 4]
    assert gradients["_embedding_collection.embeddings.item_table.weight"].abs().sum() > 0
    model.eval()
    host = build(HostDlrmHSTU, dtype=torch.float64)
    host.load_state_dict({k: v for k, v in model.state_dict().items() if "hook" not in k})
    torch.testing.assert_close(model(*data)[3], host.eval()(*data)[3], rtol=1e-9, atol=1e-9)
    assert lengths[-1] == [40 + 4, 3 + 4]


def test_slots_are_gin_parameters() -> None:
    gin.parse_config(f"""
        import hpgr_plugin.hosts.dlrm_v3
        hpgr.DlrmHSTU.sem = @hpgr.SessionEnhancementModule()
        hpgr.SessionEnhancementModule.embedding_dim = {TABLE_DIM}
        hpgr.DlrmHSTU.positional_encoder = @hpgr.TimeAwarePositionalEncoder()
        hpgr.TimeAwarePositionalEncoder.embedding_dim = {WIDTH}
        hpgr.TimeAwarePositionalEncoder.max_positions = 64
        hpgr.DlrmHSTU.attention_hook = @hpgr.PreferenceGuidedSparseAttention()
        hpgr.PreferenceGuidedSparseAttention.top_k = 3
        hpgr.DlrmHSTU.model_config = {{"hstu_attn_num_layers": 2}}
        hpgr.DlrmHSTU.table_config = {{"item_table": {{"num_embeddings": 60}}}}
    """)
    model = build(configured("DlrmHSTU"))
    assert isinstance(model.sem, SessionEnhancementModule)
    assert model.attention_hook.settings.top_k == 3
    assert len(model._hstu_transducer._stu_module._stu_layers) == 2
    assert model._embedding_collection.embeddings["item_table"].weight.shape[0] == 60
    outputs, gradients = step(model, batch(LENGTHS, CANDIDATES))
    assert all(torch.isfinite(t).all() for t in [*outputs, *gradients.values()])


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ({"sem": SessionEnhancementModule(embedding_dim=8)}, "sem .* embedding_dim=16"),
        (
            {"positional_encoder": TimeAwarePositionalEncoder(embedding_dim=8, max_positions=9)},
            "positional_encoder .* embedding_dim=24",
        ),
        (
            {"positional_encoder": TimeAwarePositionalEncoder(embedding_dim=24, form="relative")},
            "positional_encoder takes .*form = 'absolute'",
        ),
        ({"model_config": {"layers": 3}}, "hpgr.DlrmHSTU.model_config sets 'layers'"),
        ({"table_config": {"movies": {}}}, r"hpgr.DlrmHSTU.table_config names table 'movies'"),
        ({"time_unit": "min"}, "hpgr.DlrmHSTU.time_unit must be one of s, ms, got 'min'"),
        ({"attention_hook": everything(table="frozen")}, "needs pretrained"),
    ],
)
def test_a_slot_that_does_not_fit_is_an_error(slots: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(DlrmHSTU, **slots)
