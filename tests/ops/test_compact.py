"""Short sequences: the identity behind them, their rows, and the operator that copies rows."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from triton_device import DEVICE

from hpgr_plugin.components.positions import TimeAwarePositionalEncoder, time_aware_index
from hpgr_plugin.ops.compact import KeptRows, compact
from hpgr_plugin.ops.compact.parts import SequenceParts, row_weights, short_sequences
from hpgr_plugin.ops.hstu_attention import (
    AttentionSpec,
    Places,
    PositionTimeBias,
    hstu_attention,
)
from hpgr_plugin.ops.preference_plan import PreferencePlan, plan_preferences

DIM, HEADS, WIDTH, LAYERS = 6, 2, 4, 3
HISTORY = [13, 0, 30, 2]
CANDIDATES = [2, 2, 3, 0]


class Layer(nn.Module):
    """One HSTU layer, naive: norm, uvqk, attention with column weights, gate, residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.uvqk = nn.Linear(DIM, 4 * HEADS * WIDTH)
        self.attention_norm = nn.LayerNorm(HEADS * WIDTH)
        self.out = nn.Linear(HEADS * WIDTH, DIM)
        self.position_table = nn.Parameter(torch.randn(2 * 12))
        self.time_table = nn.Parameter(torch.randn(8))

    def forward(
        self, x: Tensor, offsets: Tensor, weights: Tensor, times: Tensor, positions: Tensor,
        norm_length: float, mask_position: str,
    ) -> Tensor:  # fmt: skip
        uvqk = F.silu(self.uvqk(self.norm(x))).view(len(x), HEADS, 4 * WIDTH)
        u, v, q, k = uvqk.split(WIDTH, dim=-1)
        spec = AttentionSpec(
            offsets=offsets, max_length=int(offsets.diff().max()), alpha=WIDTH**-0.5,
            norm_length=norm_length, column_weights=weights, mask_position=mask_position,
            places=Places(positions, times),
        )  # fmt: skip
        bias = PositionTimeBias(self.position_table, self.time_table, exact_positions=8)
        o = hstu_attention(q, k, v, spec, bias=bias, backend="naive")
        return x + self.out(u.flatten(1) * self.attention_norm(o.flatten(1)))


def parts_of(history_offsets: Tensor, candidate_offsets: Tensor) -> SequenceParts:
    """Sequences [history | candidates] without a contextual prefix."""
    return SequenceParts(
        seq_offsets=history_offsets + candidate_offsets,
        history_offsets=history_offsets,
        candidate_offsets=candidate_offsets,
        contextual_len=0,
        num_history=int(history_offsets[-1]),
        num_candidates=int(candidate_offsets[-1]),
    )


def merged(parts: SequenceParts, history: Tensor, candidates: Tensor) -> Tensor:
    """Histories and candidates in the order of the sequences."""
    place = torch.cat([parts.history_rows(), parts.candidate_rows()])
    return torch.cat([history, candidates])[place.argsort()]


def run_stack(layers, tokens, offsets, weights, times, positions, norm_length, mask_position):
    outputs = []
    for layer in layers:
        tokens = layer(tokens, offsets, weights, times, positions, norm_length, mask_position)
        outputs.append(tokens[offsets[1:] - 1])
    return torch.stack(outputs)  # the candidate's row after every layer


@pytest.fixture
def inputs(offsets_of, sorted_times):
    return {
        "history_embeddings": torch.randn(sum(HISTORY), DIM, dtype=torch.float64),
        "candidate_embeddings": torch.randn(sum(CANDIDATES), DIM, dtype=torch.float64),
        "history_offsets": offsets_of(HISTORY),
        "candidate_offsets": offsets_of(CANDIDATES),
        "history_timestamps": sorted_times(HISTORY, 1000),
        "candidate_timestamps": torch.randint(500, 1200, (sum(CANDIDATES),)),
    }


@pytest.mark.parametrize("mask_position", ["post", "pre"])
@pytest.mark.parametrize(
    "settings",
    [{"top_k": 2, "sigma": 0.7}, {"top_k": 3, "sigma": 1.0, "recent": 4}, {"top_k": 50}],
    ids=str,
)
def test_the_short_stack_is_the_dense_masked_stack(inputs, settings, mask_position):
    plan = plan_preferences(**inputs, **settings)
    history_offsets, candidate_offsets = inputs["history_offsets"], inputs["candidate_offsets"]
    history_times, candidate_times = inputs["history_timestamps"], inputs["candidate_timestamps"]
    history_places = torch.cat([torch.arange(n) for n in HISTORY])
    norm_length = max(HISTORY) + 1
    layers = nn.ModuleList([Layer() for _ in range(LAYERS)]).double()
    encoder = TimeAwarePositionalEncoder(embedding_dim=DIM, max_positions=norm_length).double()
    history = inputs["history_embeddings"].requires_grad_()
    candidates = inputs["candidate_embeddings"].requires_grad_()

    # Positions belong to the full sequence: encode first, compact second.
    encoded, encoded_candidates = encoder(
        history, history_offsets, history_times, candidates, candidate_offsets, candidate_times
    )
    times = (history_times, history_offsets, candidate_times, candidate_offsets)
    candidate_places = time_aware_index(*times)[1] - 1
    parts = parts_of(history_offsets, candidate_offsets)
    rows = short_sequences(parts, plan, per_user=False)

    short = run_stack(
        layers,
        merged(parts, encoded, encoded_candidates)[rows.index],
        torch.cat([rows.lengths[:0].new_zeros(1), rows.lengths.cumsum(0)]),
        rows.weights,
        merged(parts, history_times, candidate_times)[rows.index],
        merged(parts, history_places, candidate_places)[rows.index],
        norm_length,
        mask_position,
    )

    dense = []
    for c, user in enumerate(b for b, n in enumerate(CANDIDATES) for _ in range(n)):
        items = slice(int(history_offsets[user]), int(history_offsets[user + 1]))
        kept = slice(int(plan.offsets[c]), int(plan.offsets[c + 1]))
        weights = torch.zeros(HISTORY[user] + 1, dtype=torch.float64)
        weights[plan.index[kept] - items.start] = plan.weights[kept]
        weights[-1] = 1.0
        own = slice(c, c + 1)
        output = run_stack(
            layers,
            torch.cat([encoded[items], encoded_candidates[own]]),
            torch.tensor([0, HISTORY[user] + 1]),
            weights,
            torch.cat([history_times[items], candidate_times[own]]),
            torch.cat([history_places[items], candidate_places[own]]),
            norm_length,
            mask_position,
        )
        dense.append(output)
    whole = torch.cat(dense, dim=1)

    assert short.shape == whole.shape == (LAYERS, sum(CANDIDATES), DIM)
    assert float((short - whole).detach().abs().max()) < 1e-10
    sources = [history, candidates, *encoder.parameters(), *layers.parameters()]
    probe = torch.randn_like(short)
    short_gradients = torch.autograd.grad((short * probe).sum(), sources, retain_graph=True)
    whole_gradients = torch.autograd.grad((whole * probe).sum(), sources)
    gaps = [
        float((a - b).abs().max()) for a, b in zip(short_gradients, whole_gradients, strict=True)
    ]
    largest = float((short - whole).detach().abs().max())
    print(f"{largest:.1e} forward, {max(gaps):.1e} over all gradients")
    assert max(gaps) < 1e-10
    assert float(whole_gradients[0].abs().max()) > 1e-3  # the history does take part


def test_rows_of_one_short_sequence_per_candidate(inputs):
    plan = plan_preferences(**inputs, top_k=2, sigma=0.7)
    parts = parts_of(inputs["history_offsets"], inputs["candidate_offsets"])
    short = short_sequences(parts, plan, per_user=False)
    source = merged(parts, torch.arange(sum(HISTORY)), 1000 + torch.arange(sum(CANDIDATES)))
    assert short.num_targets.tolist() == [1] * sum(CANDIDATES)
    assert parts.candidate_users().tolist() == [0, 0, 1, 1, 2, 2, 2]
    offsets = [0, *short.lengths.cumsum(0).tolist()]
    for c in range(sum(CANDIDATES)):
        tokens = slice(offsets[c], offsets[c + 1])
        kept = slice(int(plan.offsets[c]), int(plan.offsets[c + 1]))
        assert source[short.index[tokens]].tolist() == [*plan.index[kept].tolist(), 1000 + c]
        assert short.weights[tokens].tolist() == [*plan.weights[kept].tolist(), 1.0]


def test_rows_of_one_short_sequence_per_user(offsets_of):
    plan = PreferencePlan(torch.tensor([1, 4]), torch.ones(2), torch.tensor([0, 1, 2]))
    parts = parts_of(offsets_of([3, 2]), offsets_of([2, 1]))
    short = short_sequences(parts, plan, per_user=True)
    source = merged(parts, torch.arange(5), 1000 + torch.arange(3))[short.index]
    assert source.tolist() == [1, 1000, 1001, 4, 1002]
    assert (short.lengths.tolist(), short.num_targets.tolist()) == ([3, 2], [2, 1])


def test_no_candidates(offsets_of):
    plan = plan_preferences(torch.randn(3, 2), torch.randn(0, 2), offsets_of([3]), offsets_of([0]))
    short = short_sequences(parts_of(offsets_of([3]), offsets_of([0])), plan, per_user=False)
    assert (short.index.tolist(), short.lengths.tolist()) == ([], [])


def test_row_weights_of_a_shared_history(offsets_of):
    plan = PreferencePlan(
        torch.tensor([0, 2, 4]), torch.tensor([1.0, 0.5, 0.25]), torch.tensor([0, 2, 2, 3])
    )
    weights = row_weights(parts_of(offsets_of([3, 2]), offsets_of([2, 1])), plan, 5)
    assert weights.tolist() == [
        [1.0, 0.0, 0.5, 1.0, 0.0],
        [0.0, 0.0, 0.0, 0.0, 1.0],
        [0.0, 0.25, 1.0, 0.0, 0.0],
    ]


@pytest.mark.parametrize("spare", [0, 3])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_rows_are_copied_and_gradients_added_up(backend: str, spare: int) -> None:
    history = torch.randn(6, 5, device=DEVICE, requires_grad=True)
    candidates = torch.randn(2, 5, device=DEVICE, requires_grad=True)
    # The unspecified end of an index may hold anything.
    index = torch.tensor([0, 3, 6, 3, 5, 7, *[-(2**20)] * spare], device=DEVICE)
    kept = KeptRows(index, torch.tensor([0, 3, 6], device=DEVICE), 6 + spare)
    probe = torch.randn(6 + spare, 5, device=DEVICE)
    results = []
    for name in (backend, "naive"):
        rows = compact(history, candidates, kept, backend=name)
        results.append((rows, *torch.autograd.grad((rows * probe).sum(), (history, candidates))))
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference)
    assert not results[0][0][6:].any()
