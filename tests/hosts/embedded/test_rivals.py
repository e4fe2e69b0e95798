"""What each rival reads of a history: order or not, both directions or one, features, nothing."""

from dataclasses import replace

import pytest
import torch
from test_ranker import BATCH, NUM_ITEMS, make_batch, make_model
from torch import Tensor

from hpgr_plugin.config.registry import ENCODER, GROUPS, load
from hpgr_plugin.data.batch import Batch
from hpgr_plugin.hosts.embedded.model.rivals.bert4rec import BERT4Rec
from hpgr_plugin.hosts.embedded.model.rivals.dnn import DNN
from hpgr_plugin.hosts.embedded.model.rivals.gru4rec import GRU4Rec
from hpgr_plugin.hosts.embedded.model.rivals.interface import (
    RivalEncoder,
    RivalSizes,
    RivalTokens,
)
from hpgr_plugin.hosts.embedded.model.rivals.moe import MoE
from hpgr_plugin.hosts.embedded.model.rivals.sasrec import SASRec
from hpgr_plugin.hosts.embedded.model.rivals.wukong import Wukong, WukongLayer
from hpgr_plugin.hosts.embedded.model.tokens import RequestIndex

RIVALS = [load(entry.target) for entry in GROUPS["embedded"] if entry.slot == ENCODER]
POOLED, SEQUENTIAL = [DNN, MoE, Wukong], [BERT4Rec, GRU4Rec, SASRec]


def request_of(length: int, candidates: int = 1) -> Batch:
    """One user whose candidates come after the whole history."""
    batch = make_batch([length], [candidates])
    batch.candidate_timestamps[:] = batch.history_timestamps[-1] + 1
    return batch


def tokens_of(batch: Batch, *, context: Tensor | None = None) -> RivalTokens:
    """Random tokens of width 8 for these requests."""
    torch.manual_seed(1)
    return RivalTokens(
        batch=batch,
        index=RequestIndex.of(batch, hide_future=True),
        history=torch.randn(len(batch.history_items), 8, dtype=torch.float64),
        candidates=torch.randn(batch.num_candidates, 8, dtype=torch.float64),
        context=context,
    )


def encoder_of(kind: type[RivalEncoder], **settings: int) -> RivalEncoder:
    torch.manual_seed(0)
    sizes = RivalSizes(embedding_dim=8, num_heads=2, dropout=0.0, max_history=16)
    return kind(sizes=sizes, **settings).double().eval()


def test_every_rival_is_tested() -> None:
    assert set(RIVALS) == {*POOLED, *SEQUENTIAL}


@pytest.mark.parametrize("rival", RIVALS)
def test_only_sequence_models_read_the_order(rival: type[RivalEncoder]) -> None:
    model, batch = make_model(encoder=rival), request_of(6)
    order = torch.tensor([3, 1, 2, 0, 4, 5])
    swapped = replace(
        batch,
        history_items=batch.history_items[order],
        history_actions=batch.history_actions[order],
    )
    same = torch.allclose(model(swapped), model(batch), rtol=0, atol=1e-12)
    assert same == (rival in POOLED)


@pytest.mark.parametrize("rival", RIVALS)
def test_every_input_is_read(rival: type[RivalEncoder]) -> None:
    """Items, actions, candidates, and the features of users and items."""
    model = make_model(
        encoder=rival,
        user_feature_sizes={"age": 3, "job": 2},
        item_feature_codes={"genre": torch.arange(NUM_ITEMS) % 4},
    )
    batch = replace(request_of(6, 2), user_features={"age": torch.tensor([1])})
    batch.user_features["job"] = torch.tensor([0])
    before = model(batch)
    for change in (
        {"history_items": (batch.history_items + 1) % NUM_ITEMS},
        {"history_actions": (batch.history_actions + 1) % 5},
        {"candidate_items": (batch.candidate_items + 1) % NUM_ITEMS},
        {"user_features": {**batch.user_features, "age": torch.tensor([2])}},
    ):
        assert not torch.equal(model(replace(batch, **change)), before), change
    with torch.no_grad():
        model.item_features.tables["genre"].weight.normal_()
    assert not torch.allclose(model(batch), before)


@pytest.mark.parametrize("rival", RIVALS)
def test_a_request_scores_as_it_does_alone(rival: type[RivalEncoder]) -> None:
    """Padding and the other requests of a batch change nothing."""
    model, batch = make_model(encoder=rival), make_batch(**BATCH)
    together = model(batch)
    for user in range(batch.num_requests):
        rows = slice(*batch.history_offsets[user : user + 2].tolist())
        wanted = slice(*batch.candidate_offsets[user : user + 2].tolist())
        alone = Batch(
            history_items=batch.history_items[rows],
            history_timestamps=batch.history_timestamps[rows],
            history_actions=batch.history_actions[rows],
            history_offsets=torch.tensor([0, rows.stop - rows.start]),
            candidate_items=batch.candidate_items[wanted],
            candidate_timestamps=batch.candidate_timestamps[wanted],
            candidate_labels=batch.candidate_labels[wanted],
            candidate_offsets=torch.tensor([0, wanted.stop - wanted.start]),
            users=batch.users[user : user + 1],
        )
        torch.testing.assert_close(model(alone), together[wanted], rtol=0, atol=1e-12)


def test_the_mean_is_that_of_the_visible_items() -> None:
    tokens = tokens_of(make_batch(**BATCH))
    mean = tokens.visible_mean()
    for c in range(tokens.batch.num_candidates):
        start = int(tokens.batch.history_offsets[tokens.index.candidate_users[c]])
        seen = tokens.history[start : start + int(tokens.index.visible[c])]
        want = seen.mean(0) if len(seen) else torch.zeros(8, dtype=torch.float64)
        torch.testing.assert_close(mean[c], want)


def test_the_experts_are_mixed_by_a_softmax() -> None:
    encoder, tokens = encoder_of(MoE, num_experts=3), tokens_of(request_of(4, 2))
    with torch.no_grad():  # a gate that is sure of the second expert
        encoder.gate.weight.zero_()
        encoder.gate.bias.copy_(torch.tensor([0.0, 50.0, 0.0]))
    inputs = torch.cat([tokens.users()[[0, 0]], tokens.visible_mean(), tokens.candidates], dim=1)
    torch.testing.assert_close(encoder(tokens), encoder.experts[1](inputs))
    with torch.no_grad():
        encoder.gate.bias.zero_()
    want = torch.stack([expert(inputs) for expert in encoder.experts]).mean(0)
    torch.testing.assert_close(encoder(tokens), want)


@pytest.mark.parametrize("rival", [GRU4Rec, SASRec])
def test_a_state_is_that_of_the_visible_prefix(rival: type[RivalEncoder]) -> None:
    """A history that ends where a candidate stops seeing gives it the same state."""
    encoder, batch = encoder_of(rival), make_batch([9], [4])
    tokens = tokens_of(batch)
    output = encoder(tokens)
    for c, visible in enumerate(tokens.index.visible.tolist()):
        short = replace(
            batch,
            history_items=batch.history_items[:visible],
            history_timestamps=batch.history_timestamps[:visible],
            history_actions=batch.history_actions[:visible],
            history_offsets=torch.tensor([0, visible]),
        )
        prefix = replace(
            tokens,
            batch=short,
            index=RequestIndex.of(short, hide_future=True),
            history=tokens.history[:visible],
        )
        torch.testing.assert_close(encoder(prefix)[c], output[c], rtol=0, atol=1e-12)


def test_bert4rec_sees_both_directions_before_the_first_candidate() -> None:
    """In SASRec an early token's output never depends on a later one; in BERT4Rec it does."""
    tokens = tokens_of(request_of(6))
    changed = tokens.history.clone()
    changed[5].neg_()
    for kind, depends in ((BERT4Rec, True), (SASRec, False)):
        encoder, outputs = encoder_of(kind), []
        encoder.transformer.layers[0].register_forward_hook(
            lambda _, __, output, outputs=outputs: outputs.append(output)
        )
        encoder(tokens)
        encoder(replace(tokens, history=changed))
        first = 0 if kind is BERT4Rec else 1  # after the start token
        same = torch.allclose(outputs[0][first], outputs[1][first], rtol=0, atol=1e-12)
        assert same != depends


def test_bert4rec_reads_a_mask_not_the_candidate() -> None:
    """The transformer's tokens are the same whatever the candidate is."""
    encoder, tokens = encoder_of(BERT4Rec), tokens_of(request_of(6, 2))
    seen: list[Tensor] = []
    encoder.transformer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    encoder(tokens)
    encoder(replace(tokens, candidates=tokens.candidates + 1.0))
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0][-1], seen[0][-2])


def test_a_wukong_layer_equals_its_formula() -> None:
    torch.manual_seed(0)
    layer = WukongLayer(
        4, 8, num_linear=3, num_factorised=2, rank=5, hidden_dim=6, dropout=0.0
    ).double()
    x = torch.randn(2, 4, 8, dtype=torch.float64)
    rows = []
    for fields in x:  # [n, D]
        products = fields @ (fields.T @ layer.projection.weight.T)  # X (X^T Y)
        factorised = layer.mlp(layer.products_norm(products.flatten())).view(2, 8)
        linear = layer.compression.weight @ fields
        residual = layer.residual.weight @ fields
        rows.append(layer.norm(torch.cat([factorised, linear]) + residual))
    torch.testing.assert_close(layer(x), torch.stack(rows))


def test_attention_pooling_is_a_softmax_over_the_visible_items() -> None:
    encoder, tokens = encoder_of(Wukong), tokens_of(make_batch(**BATCH))
    pooled = encoder.attended(tokens)
    query = encoder.attended.query
    for c, visible in enumerate(tokens.index.visible.tolist()):
        start = int(tokens.batch.history_offsets[tokens.index.candidate_users[c]])
        seen = tokens.history[start : start + visible]
        weights = (seen @ query(tokens.candidates[c]) / 8**0.5).softmax(0)
        torch.testing.assert_close(pooled[c], weights @ seen)


@pytest.mark.parametrize("rival", RIVALS)
def test_bf16_autocast_is_close(rival: type[RivalEncoder]) -> None:
    model = make_model(encoder=rival, user_feature_sizes={"age": 3}).float()
    batch = replace(make_batch(**BATCH), user_features={"age": torch.tensor([0, 1, 2, 0, 1])})
    exact = model(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(batch)
    rounded.float().sum().backward()
    torch.testing.assert_close(rounded.float(), exact, rtol=0.05, atol=0.05)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("rival", RIVALS)
def test_a_device_ranks_as_the_cpu_does(rival: type[RivalEncoder]) -> None:
    """Logits and gradients in float32, and bf16 autocast near them."""
    batch, results = make_batch(**BATCH), []
    for device in ("cpu", "cuda"):
        model = make_model(encoder=rival, max_blind_share=1.0).float().to(device).train()
        logits = model(batch.to(device))
        logits.sum().backward()
        results.append([logits.cpu(), model.item_table.weight.grad.cpu()])
    for on_cpu, on_device in zip(*results, strict=True):
        torch.testing.assert_close(on_device, on_cpu, rtol=1e-2, atol=1e-2)  # tf32
    with torch.autocast("cuda", dtype=torch.bfloat16):
        rounded = model(batch.to("cuda"))
    torch.testing.assert_close(rounded.float().cpu(), results[0][0], rtol=0.1, atol=0.1)
