"""The context of slate models is the same whether histories are padded or not."""

from collections.abc import Callable

import pytest
import torch
from small_slate_model import small_slate_model
from torch import Tensor

from hpgr_plugin.data import Batch
from hpgr_plugin.hosts.embedded.report.evaluation import Task
from hpgr_plugin.hosts.embedded.slates import context
from hpgr_plugin.hosts.embedded.slates.model import SlateModel


@pytest.fixture
def model(configure: Callable[..., Task]) -> SlateModel:
    log = configure().data.log
    return small_slate_model(log.num_items, log.num_actions).eval()


def batch_of(lengths: list[int], model: SlateModel) -> Batch:
    """Requests with histories of these lengths."""
    draw = torch.Generator().manual_seed(0)
    count = sum(lengths)
    times = torch.randint(0, 10**6, (count,), generator=draw)
    ends = torch.tensor([0, *lengths]).cumsum(0)
    for start, end in ends.unfold(0, 2, 1).tolist():
        times[start:end] = times[start:end].sort().values
    none = torch.zeros(0, dtype=torch.int64)
    return Batch(
        history_items=torch.randint(0, model.num_items, (count,), generator=draw),
        history_timestamps=times,
        history_actions=torch.zeros(count, dtype=torch.int64),
        history_offsets=ends,
        candidate_items=none,
        candidate_timestamps=none,
        candidate_labels=none.float(),
        candidate_offsets=torch.zeros(len(lengths) + 1, dtype=torch.int64),
        users=torch.arange(len(lengths)),
    )


def context_and_gradients(model: SlateModel, batch: Batch) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Real tokens only: what stands in padding differs."""
    model.zero_grad()
    encoded = model.context(batch)
    tokens = encoded.tokens[encoded.real]
    weights = torch.linspace(-1, 1, tokens.numel(), dtype=tokens.dtype, device=tokens.device)
    (tokens.flatten() * weights).sum().backward()
    parameters = [model.item_table, *model.context_encoder.children()]
    gradients = [p.grad for module in parameters for p in module.parameters()]
    return tokens.detach(), encoded.real, [g.clone() for g in gradients if g is not None]


@pytest.mark.parametrize("lengths", [[5, 0, 60, 1], [0, 0], [1], [60]])
def test_without_padding(
    lengths: list[int], model: SlateModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the kernels of a GPU are given, on the operator's backend for a CPU."""
    batch, model = batch_of(lengths, model), model.double()
    padded = context_and_gradients(model, batch)
    monkeypatch.setattr(context, "runs_jagged", lambda tokens, num_heads: True)
    jagged = context_and_gradients(model, batch)
    torch.testing.assert_close(jagged, padded, rtol=1e-9, atol=1e-9)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(model: SlateModel) -> None:
    batch = batch_of([5, 0, 60, 1], model)
    tokens, real, gradients = context_and_gradients(model, batch)
    got = context_and_gradients(model.cuda(), batch.to("cuda"))
    torch.testing.assert_close(got[0].cpu(), tokens, rtol=1e-3, atol=1e-3)
    assert torch.equal(got[1].cpu(), real)
    for mine, wanted in zip(got[2], gradients, strict=True):
        torch.testing.assert_close(mine.cpu(), wanted, rtol=1e-2, atol=1e-2)
