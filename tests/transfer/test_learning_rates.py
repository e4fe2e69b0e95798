"""Parameter groups, measured by what a step does."""

import pytest
import torch
from torch import nn

from hpgr_plugin.transfer.learning_rates import parameter_groups


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.item_table = nn.Embedding(5, 4)
        self.sem = nn.Linear(4, 4)
        self.semantic_head = nn.Linear(4, 1)

    def forward(self, items):
        return self.semantic_head(self.sem(self.item_table(items)))


def updates(**settings) -> dict[str, float]:
    """Mean size of each parameter's first update."""
    model = Model()
    optimizer = torch.optim.AdamW(parameter_groups(model, **settings))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(torch.arange(5)).sum().backward()
    optimizer.step()
    return {n: (p - before[n]).abs().mean().item() for n, p in model.named_parameters()}


@pytest.mark.parametrize("ratio", [1.0, 0.1, 0.03])
def test_the_real_update_has_the_ratio(ratio):
    # The first step of AdamW has the size of the learning rate, whatever the gradient.
    sizes = updates(inherited=("item_table", "sem"), lr=1e-2, inherited_lr_ratio=ratio)
    for name in ("item_table.weight", "sem.weight", "sem.bias"):
        assert sizes[name] == pytest.approx(1e-2 * ratio, rel=1e-3), name
    for name in ("semantic_head.weight", "semantic_head.bias"):
        assert sizes[name] == pytest.approx(1e-2, rel=1e-3), name


def test_ratio_zero_freezes_even_against_weight_decay():
    sizes = updates(inherited=("item_table",), lr=1e-2, inherited_lr_ratio=0.0, weight_decay=0.5)
    assert sizes["item_table.weight"] == 0.0
    assert sizes["sem.weight"] > 0.0


def test_nothing_inherited_is_one_group():
    groups = parameter_groups(Model(), inherited=(), lr=0.1)
    assert [group["name"] for group in groups] == ["fresh"]
    assert len(groups[0]["params"]) == 5


def test_every_parameter_is_in_one_group():
    model = Model()
    groups = parameter_groups(model, inherited=("sem.weight", "item_table"), lr=0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    assert {g["name"]: sorted(names[id(p)] for p in g["params"]) for g in groups} == {
        "inherited": ["item_table.weight", "sem.weight"],
        "fresh": ["sem.bias", "semantic_head.bias", "semantic_head.weight"],
    }


def test_names_that_are_frozen_first_have_a_group_of_their_own():
    model = Model()
    groups = parameter_groups(
        model, inherited=("item_table", "sem"), lr=0.1, frozen_epochs={"sem": 2, "item_table": 0}
    )
    names = {id(p): name for name, p in model.named_parameters()}
    shown = {
        g["name"]: (sorted(names[id(p)] for p in g["params"]), g.get("frozen_epochs", 0))
        for g in groups
    }
    assert shown == {
        "inherited": (["item_table.weight"], 0),
        "inherited_sem": (["sem.bias", "sem.weight"], 2),
        "fresh": (["semantic_head.bias", "semantic_head.weight"], 0),
    }
    assert [g["lr"] for g in groups] == pytest.approx([0.01, 0.1, 0.01])
    with pytest.raises(ValueError, match="frozen_epochs takes inherited names"):
        parameter_groups(model, inherited=("item_table",), lr=0.1, frozen_epochs={"sem": 1})


def test_parameters_without_gradient_are_left_out():
    model = Model()
    model.item_table.requires_grad_(False)
    assert len(parameter_groups(model, inherited=("item_table",), lr=0.1)) == 1


@pytest.mark.parametrize("name", ["se", "item_tables", "sem.weights", ""])
def test_unknown_inherited_names(name):
    with pytest.raises(ValueError, match=r"inherited must name parameters of Model.*item_table"):
        parameter_groups(Model(), inherited=("item_table", name), lr=0.1)


def test_a_bare_string_is_refused():
    with pytest.raises(ValueError, match="must be a collection of names"):
        parameter_groups(Model(), inherited="sem", lr=0.1)


@pytest.mark.parametrize(
    ("argument", "value"), [("inherited_lr_ratio", 1.5), ("inherited_lr_ratio", -0.1), ("lr", -1.0)]
)
def test_bad_numbers_are_named(argument, value):
    with pytest.raises(ValueError, match=argument):
        parameter_groups(Model(), **{"inherited": (), "lr": 0.1, argument: value})
