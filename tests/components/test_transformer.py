"""The jagged encoder against a plain transformer on every segment, and its buckets."""

from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from gradients import assert_same

from hpgr_plugin.components.transformer import JaggedEncoder
from hpgr_plugin.ops.segments import (
    MAX_BUCKET_ROWS,
    PADDING_BUDGET,
    plan_buckets,
    segment_layout,
    segment_mean,
)

LENGTHS = [3, 0, 1, 17, 40, 3, 39, 2, 0]


def offsets_of(lengths, dtype=torch.int64):
    return torch.tensor([0, *accumulate(lengths)], dtype=dtype)


def visible(n, causal, window, sink):
    seen = torch.ones(n, n, dtype=torch.bool)
    if causal:
        seen = seen.tril()
        for i in range(n):
            for j in range(n):
                if window is not None and i - j >= window and not (sink and j == 0):
                    seen[i, j] = False
    return seen


def naive_layer(layer, x, seen):
    heads, (n, d) = layer.num_heads, x.shape
    q, k, v = (
        part.view(n, heads, d // heads).transpose(0, 1)
        for part in layer.qkv(layer.attention_norm(x)).split(d, dim=1)
    )
    scores = (q @ k.transpose(1, 2) / (d // heads) ** 0.5).masked_fill(~seen, -torch.inf)
    x = x + layer.attention_output((scores.softmax(-1) @ v).transpose(0, 1).reshape(n, d))
    return x + layer.contract(F.gelu(layer.expand(layer.feedforward_norm(x))))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("causal", "window", "sink"),
    [(False, None, False), (True, None, False), (True, 4, False), (True, 4, True)],
)
def test_equals_a_plain_transformer_for_each_segment(causal, window, sink, dtype):
    torch.manual_seed(0)
    encoder = JaggedEncoder(embedding_dim=8, num_heads=2, num_layers=2, final_norm=True).double()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    values = torch.randn(sum(LENGTHS), 8, dtype=torch.float64, requires_grad=True)
    offsets = offsets_of(LENGTHS, dtype)
    layout = segment_layout(offsets, causal=causal, window=window, sink=sink)

    def naive():
        rows = []
        for x in values.split(LENGTHS):
            for layer in encoder.layers:
                x = naive_layer(layer, x, visible(len(x), causal, window, sink))
            rows.append(encoder.final_norm(x))
        return torch.cat(rows)

    inputs = (values, *encoder.parameters())
    fast, slow = encoder(values, layout), naive()
    assert_same(fast, slow, inputs, value_atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (True, 3)])
def test_segment_mean(causal, window):
    values = torch.randn(sum(LENGTHS), 4, dtype=torch.float64)
    got = segment_mean(values, segment_layout(offsets_of(LENGTHS), causal=causal, window=window))
    want = []
    for x in values.split(LENGTHS):
        seen = visible(len(x), causal, window, False).double()
        want.append(seen @ x / seen.sum(1, keepdim=True))
    torch.testing.assert_close(got, torch.cat(want))


@pytest.mark.parametrize("seed", range(5))
def test_buckets_hold_everything_within_the_budget(seed):
    g = torch.Generator().manual_seed(seed)
    lengths = (torch.rand(3000, generator=g) ** 4 * 900).long() + 1
    distinct, counts = (x.flip(0).tolist() for x in lengths.unique(return_counts=True))
    buckets = plan_buckets(distinct, counts)
    assert sum(rows for rows, _, _ in buckets) == len(lengths)
    assert sum(tokens for _, tokens, _ in buckets) == lengths.sum()
    for rows, tokens, width in buckets:
        assert rows * width - tokens <= PADDING_BUDGET * rows * width
    assert len(buckets) < 25


def test_buckets_are_bounded_in_rows():
    buckets = plan_buckets([2, 1], [MAX_BUCKET_ROWS + 5, 3])
    assert buckets[0] == (MAX_BUCKET_ROWS, 2 * MAX_BUCKET_ROWS, 2)
    assert sum(rows for rows, _, _ in buckets) == MAX_BUCKET_ROWS + 8


def test_few_slots_are_one_bucket_however_padded():
    apart = plan_buckets([9, 1], [1, 5])
    assert apart == [(1, 9, 9), (5, 5, 1)]
    assert plan_buckets([9, 1], [1, 5], small_slots=53) == apart
    assert plan_buckets([9, 1], [1, 5], small_slots=54) == [(6, 14, 9)]


def test_no_tokens_at_all():
    encoder = JaggedEncoder(embedding_dim=8, num_heads=2, num_layers=1)
    out = encoder(torch.zeros(0, 8), segment_layout(torch.tensor([0, 0])))
    assert out.shape == (0, 8)
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


@pytest.mark.parametrize(
    ("argument", "value"), [("num_heads", 3), ("num_layers", 0), ("dropout", 1.0)]
)
def test_bad_sizes(argument, value):
    arguments = {"embedding_dim": 8, "num_heads": 2, "num_layers": 1} | {argument: value}
    with pytest.raises(ValueError, match=argument):
        JaggedEncoder(**arguments)


@pytest.mark.parametrize("num_layers", [1, 2])
def test_first_tokens_are_those_of_forward(num_layers):
    torch.manual_seed(0)
    lengths = [n for n in LENGTHS if n]
    encoder = JaggedEncoder(
        embedding_dim=8, num_heads=2, num_layers=num_layers, final_norm=True
    ).double()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    values = torch.randn(sum(lengths), 8, dtype=torch.float64, requires_grad=True)
    offsets = offsets_of(lengths)
    layout = segment_layout(offsets)
    inputs = (values, *encoder.parameters())
    fast, slow = encoder.first_tokens(values, layout), encoder(values, layout)[offsets[:-1]]
    assert_same(fast, slow, inputs, value_atol=1e-12, rtol=1e-10)
