"""The identity behind the sequence layout: the shortened stack is the dense masked stack."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpgr_plugin.components.positions import TimeAwarePositionalEncoder, time_aware_index
from hpgr_plugin.ops.compact.torch import compact_sequences, gather_tokens
from hpgr_plugin.ops.hstu_attention import naive as naive_attention
from hpgr_plugin.ops.preference_plan.torch import plan_preferences

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
        self.time_bias = nn.Embedding(8, HEADS)
        self.position_bias = nn.Embedding(40, HEADS)

    def forward(
        self, x: Tensor, offsets: Tensor, weights: Tensor, times: Tensor, positions: Tensor,
        norm_length: float, mask_position: str,
    ) -> Tensor:  # fmt: skip
        uvqk = F.silu(self.uvqk(self.norm(x))).view(len(x), HEADS, 4 * WIDTH)
        u, v, q, k = uvqk.split(WIDTH, dim=-1)
        bias = []
        for start, end in zip(offsets.tolist(), offsets[1:].tolist(), strict=False):
            age = times[start:end, None] - times[None, start:end]
            apart = positions[start:end, None] - positions[None, start:end]
            bucket = age.abs().clamp(min=1).log2().long().clamp(max=7)
            pair = self.time_bias(bucket) + self.position_bias(apart.clamp(0, 39))
            bias.append(pair.permute(2, 0, 1))
        o = naive_attention.hstu_attention(
            q, k, v, offsets, alpha=WIDTH**-0.5, norm_length=norm_length,
            column_weights=weights, bias=bias, mask_position=mask_position,
        )  # fmt: skip
        return x + self.out(u.flatten(1) * self.attention_norm(o.flatten(1)))


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
    compact = compact_sequences(plan, history_offsets, candidate_offsets)

    short = run_stack(
        layers,
        gather_tokens(compact, plan, encoded, encoded_candidates),
        compact.offsets,
        compact.column_weights,
        gather_tokens(compact, plan, history_times, candidate_times),
        gather_tokens(compact, plan, history_places, candidate_places),
        norm_length,
        mask_position,
    )

    dense = []
    for c, user in enumerate(b for b, n in enumerate(CANDIDATES) for _ in range(n)):
        rows = slice(int(history_offsets[user]), int(history_offsets[user + 1]))
        kept = slice(int(plan.offsets[c]), int(plan.offsets[c + 1]))
        weights = torch.zeros(HISTORY[user] + 1, dtype=torch.float64)
        weights[plan.index[kept] - rows.start] = plan.weights[kept]
        weights[-1] = 1.0
        own = slice(c, c + 1)
        output = run_stack(
            layers,
            torch.cat([encoded[rows], encoded_candidates[own]]),
            torch.tensor([0, HISTORY[user] + 1]),
            weights,
            torch.cat([history_times[rows], candidate_times[own]]),
            torch.cat([history_places[rows], candidate_places[own]]),
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
    for got, want in zip(short_gradients, whole_gradients, strict=True):
        assert float((got - want).abs().max()) < 1e-10
    assert float(whole_gradients[0].abs().max()) > 1e-3  # the history does take part


def test_layout(inputs):
    plan = plan_preferences(**inputs, top_k=2, sigma=0.7)
    compact = compact_sequences(plan, inputs["history_offsets"], inputs["candidate_offsets"])
    source = gather_tokens(
        compact, plan, torch.arange(sum(HISTORY)), 1000 + torch.arange(sum(CANDIDATES))
    )
    assert compact.user_of.tolist() == [0, 0, 1, 1, 2, 2, 2]
    assert compact.full_lengths.tolist() == [14, 14, 1, 1, 31, 31, 31]
    for c in range(sum(CANDIDATES)):
        tokens = slice(int(compact.offsets[c]), int(compact.offsets[c + 1]))
        kept = slice(int(plan.offsets[c]), int(plan.offsets[c + 1]))
        assert source[tokens].tolist() == [*plan.index[kept].tolist(), 1000 + c]
        assert compact.column_weights[tokens].tolist() == [*plan.weights[kept].tolist(), 1.0]
        assert set(compact.candidate_of[tokens].tolist()) == {c}


def test_no_candidates(offsets_of):
    arguments = (offsets_of([3]), offsets_of([0]))
    plan = plan_preferences(torch.randn(3, 2), torch.randn(0, 2), *arguments)
    compact = compact_sequences(plan, *arguments)
    assert compact.offsets.tolist() == [0]
    assert gather_tokens(compact, plan, torch.randn(3, 2), torch.randn(0, 2)).shape == (0, 2)


def test_a_plan_of_users_is_an_error(inputs, offsets_of):
    plan = plan_preferences(**inputs)
    with pytest.raises(
        ValueError, match="a row per candidate: 7 rows, but candidate_offsets end at 5"
    ):
        compact_sequences(plan, inputs["history_offsets"], offsets_of([2, 2, 1, 0]))
