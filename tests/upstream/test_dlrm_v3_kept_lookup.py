"""Kept rows that are looked up again: values, gradients, and which lookups stay as they are."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_ranker import batch, build, step
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hpgr_plugin.components.attention_hooks import PreferenceGuidedSparseAttention
from hpgr_plugin.hosts.dlrm_v3 import DlrmHSTU, selection
from hpgr_plugin.hosts.dlrm_v3.kept_lookup import select_kept

pytestmark = pytest.mark.upstream

INDEX, OTHERS, KEPT = (
    torch.tensor([3, 1, 3, 0, 2, 3]),
    torch.tensor([3, 4]),
    torch.tensor([0, 2, 5]),
)


def table() -> Tensor:
    return torch.nn.Parameter(torch.randn(5, 4, generator=torch.Generator().manual_seed(0)))


def gradient(weight: Tensor, *rows: Tensor) -> Tensor:
    scaled = [(r * torch.arange(1.0, 1 + r.numel()).view_as(r)).sum() for r in rows]
    (grad,) = torch.autograd.grad(torch.stack(scaled).sum(), weight)
    return grad


def test_values_and_gradients_are_those_of_the_selected_rows() -> None:
    weight, unrelated = table(), table()
    looked_up = {
        "history": F.embedding(INDEX, weight),
        "candidate": F.embedding(OTHERS, weight),
        "user": F.embedding(OTHERS, unrelated),
    }
    selected = select_kept(looked_up, KEPT, ["history"])
    assert selected.keys() == {"history", "candidate"}  # the user's table loses nothing
    plain = looked_up["history"].index_select(0, KEPT)
    assert torch.equal(selected["history"], plain)
    assert torch.equal(selected["candidate"], looked_up["candidate"])
    torch.testing.assert_close(
        gradient(weight, *selected.values()), gradient(weight, plain, looked_up["candidate"])
    )


def test_the_whole_lookup_takes_no_part_in_the_backward() -> None:
    weight = table()
    whole = F.embedding(INDEX, weight)
    selected = select_kept({"history": whole}, KEPT, ["history"])["history"]
    seen: list[Any] = []
    whole.grad_fn.register_hook(lambda *_: seen.append(1))  # type: ignore[union-attr]
    selected.sum().backward()
    assert not seen
    assert weight.grad is not None


def in_place(rows: Tensor) -> Tensor:
    rows.detach().mul_(2)
    return rows


def hooked(rows: Tensor) -> Tensor:
    rows.register_hook(lambda grad: grad * 2)
    return rows


def retained(rows: Tensor) -> Tensor:
    rows.retain_grad()
    return rows


class Doubled(torch.autograd.Function):
    """An operator that keeps its argument under the name that autograd has for a leaf."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        ctx.variable = weight
        return weight * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


def freed(rows: Tensor) -> Tensor:
    rows.sum().backward()
    return rows


OTHER_ROWS: dict[str, Callable[[Tensor], Tensor]] = {
    "computed": lambda w: F.embedding(INDEX, w) * 2,
    "cast": lambda w: F.embedding(INDEX, w).double(),
    "changed in place": lambda w: in_place(F.embedding(INDEX, w)),
    "with a hook": lambda w: hooked(F.embedding(INDEX, w)),
    "whose gradient is read": lambda w: retained(F.embedding(INDEX, w)),
    "of a computed table": lambda w: F.embedding(INDEX, w * 2),
    "with a padding row": lambda w: F.embedding(INDEX, w, padding_idx=3),
    "scaled by frequency": lambda w: F.embedding(INDEX, w, scale_grad_by_freq=True),
    "of a table computed by an own operator": lambda w: F.embedding(INDEX, Doubled.apply(w)),
    "whose backward has run": lambda w: freed(F.embedding(INDEX, w)),
    "without a gradient": lambda w: F.embedding(INDEX, w.detach()),
}


@pytest.mark.parametrize("kind", OTHER_ROWS)
def test_other_rows_are_selected_as_they_are(kind: str) -> None:
    rows = OTHER_ROWS[kind](table())
    selected = select_kept({"history": rows}, KEPT, ["history"])["history"]
    assert torch.equal(selected, rows.index_select(0, KEPT))
    if rows.requires_grad:
        assert selected.grad_fn.name() == "IndexSelectBackward0"  # type: ignore[union-attr]


def test_a_compiler_traces_the_selection() -> None:
    weight = table()

    def kept_rows(weight: Tensor) -> Tensor:
        return select_kept({"history": F.embedding(INDEX, weight)}, KEPT, ["history"])["history"]

    compiled = torch.compile(kept_rows, backend="eager", fullgraph=True)
    assert torch.equal(compiled(weight), kept_rows(weight))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_lookups_have_the_gradient_of_selected_rows(reentrant: bool) -> None:
    weight = table()

    def loss(weight: Tensor) -> Tensor:
        rows = {"history": F.embedding(INDEX, weight), "candidate": F.embedding(OTHERS, weight)}
        return torch.cat([*select_kept(rows, KEPT, ["history"]).values()]).pow(3).sum()

    (wanted,) = torch.autograd.grad(loss(weight), weight)
    checkpoint(loss, weight, use_reentrant=reentrant).backward()
    torch.testing.assert_close(weight.grad, wanted)


@pytest.mark.parametrize("counts", [[1, 1, 1], [2, 3, 1]], ids=["one-each", "several"])
def test_steps_have_the_gradients_of_selected_rows(
    monkeypatch: pytest.MonkeyPatch, counts: list[int]
) -> None:
    data, results = batch([30, 4, 9], counts), []

    def as_they_are(looked_up: Any, kept: Tensor, histories: list[str]) -> dict[str, Tensor]:
        return {name: looked_up[name].index_select(0, kept) for name in histories}

    for replaced in (False, True):
        if replaced:
            monkeypatch.setattr(selection, "select_kept", as_they_are)
        hook = PreferenceGuidedSparseAttention(top_k=2, sigma=1.0, layout="per_candidate")
        results.append(step(build(DlrmHSTU, attention_hook=hook), data))
    for mine, reference in zip(results[0][0], results[1][0], strict=True):
        assert torch.equal(mine, reference)
    assert results[0][1].keys() == results[1][1].keys()
    for name, wanted in results[1][1].items():
        torch.testing.assert_close(results[0][1][name], wanted, rtol=1e-5, atol=1e-7)
