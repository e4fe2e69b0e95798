"""SEM: against a loop over users and sessions, and what may never leak."""

import copy
from itertools import accumulate

import pytest
import torch
from gradients import assert_same

from hpgr_plugin.components.sem import SessionEnhancementModule
from hpgr_plugin.components.sessions import partition_sessions
from hpgr_plugin.errors import HpgrError
from hpgr_plugin.ops.segments import segment_layout

D = 8
LENGTHS = [0, 1, 23, 0, 40, 2, 7]
FORMS = [(pooling, causal) for pooling in ("cls", "mean") for causal in (False, True)]


def build(**settings) -> SessionEnhancementModule:
    torch.manual_seed(1)
    settings = {"causal": False} | settings
    sem = SessionEnhancementModule(embedding_dim=D, num_heads=2, **settings).double()
    for parameter in sem.parameters():  # away from the identity, so that everything shows
        torch.nn.init.normal_(parameter, std=0.4)
    return sem


def histories(seed=0, lengths=LENGTHS):
    g = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *accumulate(lengths)])
    timestamps = torch.cat([torch.randint(0, 2800, (n,), generator=g).cumsum(0) for n in lengths])
    embeddings = torch.randn(sum(lengths), D, generator=g, dtype=torch.float64)
    return embeddings, offsets, timestamps


def encode(encoder, x, **layout):
    return encoder(x, segment_layout(torch.tensor([0, len(x)]), **layout))


def context_by_loop(sem, embeddings, offsets, timestamps):
    """Eq. 1 and 2, one user, one session, and in causal form one token at a time."""
    rows = []
    for start, end in zip(offsets.tolist(), offsets.tolist()[1:], strict=False):
        times, x = timestamps[start:end], embeddings[start:end]
        cuts = partition_sessions(times, torch.tensor([0, end - start]), sem.gap_seconds)
        vectors = []
        for first, last in zip(
            cuts.session_offsets.tolist(), cuts.session_offsets.tolist()[1:], strict=False
        ):
            items = x[first:last][-sem.max_session_length :] + sem.item_position[: last - first]
            vectors.append(encode(sem.intra_encoder, torch.cat([sem.session_cls[None], items]))[0])
        for session in cuts.session_index.tolist():
            rows.append(inter_by_loop(sem, vectors, session))
    return torch.stack(rows) if rows else embeddings


def inter_by_loop(sem, vectors, session):
    cls = [sem.history_cls] if sem.pooling == "cls" else []
    if not sem.causal:
        known = vectors[-sem.max_sessions :]
        x = [s + sem.session_position[len(known) - 1 - k] for k, s in enumerate(known)]
        out = encode(sem.inter_encoder, torch.stack(cls + x))
        return out[0] if cls else out.mean(0)
    if session == 0:
        return torch.zeros(D, dtype=torch.float64)
    x = [
        s + sem.session_position[min(k, sem.max_sessions - 1)]
        for k, s in enumerate(vectors[:session])
    ]
    out = encode(
        sem.inter_encoder,
        torch.stack(cls + x),
        causal=True,
        window=sem.max_sessions,
        sink=bool(cls),
    )
    return out[-1] if cls else out[-sem.max_sessions :].mean(0)


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("caps", [(50, 50), (2, 3)])
@pytest.mark.parametrize(("pooling", "causal"), FORMS)
def test_equals_a_loop(pooling, causal, caps, num_layers):
    sem = build(
        pooling=pooling,
        causal=causal,
        fusion="add",
        num_layers=num_layers,
        max_session_length=caps[0],
        max_sessions=caps[1],
    )
    embeddings, offsets, timestamps = histories()
    embeddings.requires_grad_()
    inputs = (embeddings, *sem.parameters())
    fast = sem(embeddings, offsets, timestamps) - embeddings
    slow = context_by_loop(sem, embeddings, offsets, timestamps)
    assert_same(fast, slow, inputs, value_atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("cap", [50, 4])
@pytest.mark.parametrize("fusion", ["gate", "add"])
def test_the_own_session_is_read_as_far_as_the_token(fusion, cap):
    """It equals the encoder over [CLS] and the tokens so far, one token at a time."""
    sem = build(causal=True, fusion=fusion, own_session=True, max_session_length=cap)
    plain = build(causal=True, fusion=fusion, max_session_length=cap)
    plain.load_state_dict(sem.state_dict(), strict=False)
    embeddings, offsets, timestamps = histories()
    sessions = partition_sessions(timestamps, offsets)
    rows = []
    for i, session in enumerate(sessions.session_index.tolist()):
        start = int(sessions.session_offsets[session])
        place = (torch.arange(start, i + 1) - start).clamp(max=cap - 1)
        x = embeddings[start : i + 1] + sem.item_position[place]
        x = torch.cat([sem.session_cls[None], x])
        own = encode(sem.intra_encoder, x, causal=True, window=cap, sink=True)[-1]
        if fusion == "gate":
            rms = embeddings[i].square().mean().sqrt()
            own = sem.own_gate * rms * torch.nn.functional.layer_norm(own, own.shape)
        rows.append(own)
    added = sem(embeddings, offsets, timestamps) - plain(embeddings, offsets, timestamps)
    torch.testing.assert_close(added, torch.stack(rows), rtol=0, atol=1e-10)


def test_a_session_token_says_what_was_before_its_session():
    sem = build(causal=True, session_tokens=True)
    embeddings, offsets, timestamps = histories()
    sessions = partition_sessions(timestamps, offsets)
    starts = sessions.session_offsets[:-1].tolist()
    tokens = sem.tokens(sem.context(embeddings, offsets, timestamps), offsets)
    later = [s for s in starts if s not in offsets.tolist()]
    assert tokens.before.tolist() == later
    other = embeddings.clone()
    changed = 40
    other[changed] = torch.randn(D, dtype=torch.float64)
    again = sem.tokens(sem.context(other, offsets, timestamps), offsets)
    same = (again.values == tokens.values).all(1)
    assert not same.all()
    assert torch.equal(same, (tokens.before <= changed) | (tokens.before >= 64))


def test_the_gate_starts_where_it_is_bound():
    embeddings, offsets, timestamps = histories()
    torch.manual_seed(0)
    sem = SessionEnhancementModule(embedding_dim=D, num_heads=2, causal=True, gate_init=0.1)
    assert torch.equal(sem.gate, torch.full((D,), 0.1))
    added = sem(embeddings.float(), offsets, timestamps) - embeddings.float()
    assert added.abs().max() > 0


@pytest.mark.parametrize("fusion", ["gate", "add"])
@pytest.mark.parametrize("caps", [(50, 50), (2, 3)])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("own_session", [False, True])
def test_causal_no_later_item_changes_an_earlier_token(own_session, pooling, caps, fusion):
    sem = build(
        pooling=pooling,
        causal=True,
        fusion=fusion,
        own_session=own_session,
        num_layers=2,
        max_session_length=caps[0],
        max_sessions=caps[1],
    )
    embeddings, offsets, timestamps = histories()
    before = sem(embeddings, offsets, timestamps)
    first, last = 24, 64  # the user with 40 items
    changed_something = False
    for i in range(first, last):
        other = embeddings.clone()
        other[i] = torch.randn(D, dtype=torch.float64)
        after = sem(other, offsets, timestamps)
        assert torch.equal(after[:i], before[:i])
        assert torch.equal(after[last:], before[last:])
        changed_something |= not torch.equal(after[i + 1 : last], before[i + 1 : last])
    assert changed_something


@pytest.mark.parametrize("own_session", [False, True])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_causal_the_length_and_times_of_the_future_do_not_show(pooling, own_session):
    sem = build(
        pooling=pooling,
        causal=True,
        max_sessions=3,
        max_session_length=4,
        own_session=own_session,
    )
    embeddings, _, timestamps = histories(lengths=[40])
    whole = sem(embeddings, torch.tensor([0, 40]), timestamps)
    for n in range(1, 40):
        cut = sem(embeddings[:n], torch.tensor([0, n]), timestamps[:n])
        torch.testing.assert_close(cut, whole[:n], rtol=0, atol=1e-12)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("fusion", ["gate", "add"])
def test_causal_leaves_the_first_session_as_it_is(fusion, pooling):
    sem = build(pooling=pooling, causal=True, fusion=fusion)
    embeddings, offsets, timestamps = histories()
    sessions = partition_sessions(timestamps, offsets)
    opening = torch.isin(sessions.session_index, sessions.user_offsets[:-1])
    changed = (sem(embeddings, offsets, timestamps) != embeddings).all(1)
    assert torch.equal(changed, ~opening)


def test_the_whole_history_reaches_every_token():
    sem = build()
    embeddings, offsets, timestamps = histories()
    before = sem(embeddings, offsets, timestamps)
    embeddings[63] = torch.randn(D, dtype=torch.float64)
    changed = (sem(embeddings, offsets, timestamps) != before).any(1)
    assert changed.nonzero().squeeze(1).tolist() == list(range(24, 64))


@pytest.mark.parametrize("causal", [False, True])
def test_caps_keep_the_most_recent(causal):
    sem = build(causal=causal, max_sessions=2, max_session_length=1, fusion="add")
    timestamps = torch.arange(10) // 2 * 3600  # five sessions of two items
    offsets = torch.tensor([0, 10])
    embeddings = torch.randn(10, D, dtype=torch.float64)
    before = sem(embeddings, offsets, timestamps)[-1]
    reach = []
    for i in range(9):
        other = embeddings.clone()
        other[i] = torch.randn(D, dtype=torch.float64)
        if not torch.equal(sem(other, offsets, timestamps)[-1], before):
            reach.append(i)
    # The last token reads the last item of two sessions: its own and the one before, or, causal,
    # the two before its own.
    assert reach == ([5, 7] if causal else [7])


@pytest.mark.parametrize(("pooling", "causal"), FORMS)
def test_the_gate_starts_as_the_identity_and_learns(pooling, causal):
    torch.manual_seed(0)
    sem = SessionEnhancementModule(
        embedding_dim=D, num_heads=2, pooling=pooling, causal=causal
    ).double()
    embeddings, offsets, timestamps = histories()
    out = sem(embeddings, offsets, timestamps)
    assert torch.equal(out, embeddings)
    out.square().sum().backward()
    assert sem.gate.grad.abs().min() > 0


def test_the_gate_keeps_the_scale_of_the_table():
    sem = build()
    torch.nn.init.ones_(sem.gate)
    embeddings, offsets, timestamps = histories()
    small = 0.02 * embeddings
    added = (sem(small, offsets, timestamps) - small).square().mean(1).sqrt()
    torch.testing.assert_close(added, small.square().mean(1).sqrt(), rtol=1e-3, atol=0)


@pytest.mark.parametrize(("pooling", "causal"), FORMS)
@pytest.mark.parametrize("lengths", [[], [0], [0, 0], [1], [0, 1, 0], [1, 1]])
def test_edges_are_finite_and_every_parameter_has_a_gradient(lengths, pooling, causal):
    sem = build(pooling=pooling, causal=causal)
    embeddings, offsets, timestamps = (
        histories(lengths=lengths)
        if lengths
        else (torch.zeros(0, D).double(), torch.tensor([0]), torch.zeros(0, dtype=torch.int64))
    )
    out = sem(embeddings, offsets, timestamps)
    assert out.shape == embeddings.shape
    assert out.isfinite().all()
    out.sum().backward()
    for name, parameter in sem.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize(("pooling", "causal"), FORMS)
def test_bfloat16_autocast_stays_near_float32(pooling, causal):
    sem = build(pooling=pooling, causal=causal).float()
    embeddings, offsets, timestamps = histories()
    embeddings = embeddings.float().requires_grad_()
    want = sem(embeddings, offsets, timestamps)
    with torch.autocast("cpu", torch.bfloat16):
        got = sem(embeddings, offsets.int(), timestamps)
    assert got.dtype == torch.float32
    assert (got - want).norm() < 0.03 * want.norm()
    got.sum().backward()
    assert embeddings.grad.isfinite().all()


def test_the_dtype_of_the_embeddings_comes_back():
    embeddings, offsets, timestamps = histories()
    sem = build().float()
    assert sem(embeddings.bfloat16(), offsets, timestamps).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("pooling", "max"),
        ("fusion", "concat"),
        ("max_sessions", 0),
        ("max_session_length", 0),
        ("gap_seconds", -1),
        ("num_heads", 3),
        ("gate_init", float("nan")),
    ],
)
def test_bad_arguments_are_named(argument, value):
    with pytest.raises(ValueError, match=argument):
        SessionEnhancementModule(**{"embedding_dim": D, argument: value})


def test_without_a_gate_it_starts_nowhere():
    with pytest.raises(ValueError, match="gate_init must be 0 with fusion = 'add'"):
        SessionEnhancementModule(embedding_dim=D, fusion="add", gate_init=0.1)


@pytest.mark.parametrize("required", [False, True])
def test_the_host_decides_causal(required):
    embeddings, offsets, timestamps = histories()
    sem = build(causal=None)
    with pytest.raises(ValueError, match="causal is undecided"):
        sem(embeddings, offsets, timestamps)
    sem.decide_causal(required, "candidates share a history")
    want = build(causal=required)(embeddings, offsets, timestamps)
    assert torch.equal(sem(embeddings, offsets, timestamps), want)
    sem.decide_causal(required, "the same again")


def test_a_required_causal_form_is_not_given_up():
    sem = build(causal=True)
    sem.decide_causal(False, "")
    assert sem.causal is True
    with pytest.raises(HpgrError, match="got False: candidates share a history, so SEM would"):
        build(causal=False).decide_causal(True, "candidates share a history")


def test_session_tokens_need_the_causal_form():
    with pytest.raises(HpgrError, match="session_tokens needs causal = True or None"):
        build(causal=False, session_tokens=True)
    sem = build(causal=None, session_tokens=True)
    sem.decide_causal(False, "")
    assert sem.causal is True
    with pytest.raises(HpgrError, match=r"session_tokens must be False for a host: only"):
        sem.refuse_tokens("a host")


def test_embeddings_of_another_size():
    _, offsets, timestamps = histories()
    with pytest.raises(ValueError, match=r"embeddings must be \[73, 8\]"):
        build()(torch.zeros(73, 4), offsets, timestamps)


@pytest.mark.gpu
@pytest.mark.parametrize(("pooling", "causal"), FORMS)
def test_cuda_equals_cpu_and_repeats_exactly(pooling, causal):
    sem = build(pooling=pooling, causal=causal, max_sessions=16)
    lengths = torch.randint(0, 60, (2000,), generator=torch.Generator().manual_seed(0)).tolist()
    embeddings, offsets, timestamps = histories(lengths=lengths)

    def run(device, dtype):
        module = copy.deepcopy(sem).to(device, dtype)
        x = embeddings.to(device, dtype).requires_grad_()
        out = module(x, offsets.to(device), timestamps.to(device))
        return [out, *torch.autograd.grad(out.square().sum(), (x, *module.parameters()))]

    for got, want in zip(run("cuda", torch.float64), run("cpu", torch.float64), strict=True):
        torch.testing.assert_close(got.cpu(), want, rtol=1e-8, atol=1e-8)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        first, second = run("cuda", torch.float32), run("cuda", torch.float32)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
