"""Stage 1 with a sharded item table trains as the unsharded one on the data of all processes."""

import copy
import importlib.util
import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from several_processes import in_processes, load_rows
from torch import Tensor

from hpgr_plugin.components.mim import MaskedItemModel
from hpgr_plugin.components.sem import SessionEnhancementModule
from hpgr_plugin.errors import HpgrError
from hpgr_plugin.hosts.embedded.train.shards import clip_gradients, data_parallel, gather_blocks
from hpgr_plugin.transfer.handoff import load_handoff, save_handoff, save_handoff_in_blocks

V, D, CLIP = 45, 16, 0.05
NO_TORCHREC = importlib.util.find_spec("torchrec") is None


def build(tables: str, *, sampled: bool) -> MaskedItemModel:
    torch.manual_seed(5)
    return MaskedItemModel(
        num_items=V,
        embedding_dim=D,
        num_layers=1,
        sem=SessionEnhancementModule(embedding_dim=D, causal=False),
        full_softmax_max_items=V - 1 if sampled else V,
        num_sampled=20,
        item_counts=torch.arange(V) if sampled else None,
        condition_on_action=sampled,
        num_actions=3,
        tables=tables,
    )


def histories(process: int, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Another number of users and items for every process; one has a step without any."""
    g = torch.Generator().manual_seed(100 * process + step)
    lengths = [] if process == 1 and step == 2 else [7, 0, 11 + process, 1, 5][: 3 + process]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    total = sum(lengths)
    items = torch.randint(0, V, (total,), generator=g)
    times = torch.arange(total) * 900
    return items, offsets, times


def masks(process: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed(7 * step + process)


def optimizer_of(model: MaskedItemModel) -> torch.optim.Optimizer:
    """AdamW as the trainer has, and SGD, which does not forgive a gradient of the wrong size."""
    if model.num_sampled is None:
        return torch.optim.SGD(model.parameters(), lr=5.0)
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.01)


@pytest.mark.parametrize(
    ("processes", "steps"),
    [(2, 3), *(pytest.param(n, 6, marks=pytest.mark.slow) for n in (2, 4))],
)
def test_training_equals_that_of_the_whole_table(processes: int, steps: int, tmp_path) -> None:
    in_processes(processes, check_training, str(tmp_path), steps)


def check_training(folder: str, steps: int) -> None:
    """With 'rows' and 'torchrec': to start the processes takes longer than to train."""
    for sampled in (False, True):
        whole = build("dense", sampled=sampled)
        initial = copy.deepcopy(whole.state_dict())
        wanted = train_whole(whole, steps)
        for tables in ("rows",) if NO_TORCHREC else ("rows", "torchrec"):
            model = build(tables, sampled=sampled)
            load_rows(model.item_table, initial["item_table.weight"])
            others = {k: v for k, v in initial.items() if k != "item_table.weight"}
            model.load_state_dict(others, strict=False)
            losses = train_sharded(model, steps)
            torch.testing.assert_close(losses, wanted, rtol=1e-5, atol=1e-5)
            check_handoff(model, whole.item_table.weight.detach(), folder)
            for name, value in model.state_dict().items():
                if name != "item_table.weight":
                    torch.testing.assert_close(
                        value, whole.state_dict()[name], rtol=1e-4, atol=1e-5, msg=name
                    )


def train_whole(model: MaskedItemModel, steps: int) -> list[float]:
    """One model on the batches of all processes, as one batch: the mean is over all items."""
    optimizer, losses = optimizer_of(model), []
    for step in range(steps):
        outputs = [
            model(*batch, actions=batch[0] % 3, generator=masks(process, step))
            for process in range(dist.get_world_size())
            for batch in (histories(process, step),)
        ]
        terms = sum(output.num_masked for output in outputs)
        loss = sum(output.loss * output.num_masked for output in outputs) / terms
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        assert norm > CLIP
        optimizer.step()
        losses.append(loss.item())
    return losses


def train_sharded(model: MaskedItemModel, steps: int) -> list[float]:
    """As the trainer does it."""
    process, world = dist.get_rank(), dist.get_world_size()
    forward, optimizer, losses = data_parallel(model), optimizer_of(model), []
    for step in range(steps):
        batch = histories(process, step)
        plan = model.plan(*batch, generator=masks(process, step))
        output = forward(*batch, actions=batch[0] % 3, plan=plan)
        sums = torch.stack([output.loss * output.num_masked, torch.tensor(output.num_masked)])
        total = sums.detach().clone()
        dist.all_reduce(total)
        optimizer.zero_grad()
        (sums[0] / total[1] * world).backward()
        clip_gradients(model, CLIP)
        optimizer.step()
        losses.append((total[0] / total[1]).item())
    return losses


def check_handoff(model: MaskedItemModel, whole: Tensor, folder: str) -> None:
    """The rows travel to the first process in blocks, and its file is a hand-over as any."""
    from hpgr_plugin.hosts.embedded.train import shards

    shards._ROWS_PER_BLOCK = 5
    blocks = gather_blocks(model.item_table)
    common: dict[str, Any] = {
        "sem": model.sem, "vocabulary_digest": "abc", "gap_seconds": model.gap_seconds,
    }  # fmt: skip
    if dist.get_rank():
        assert all(len(block) == 0 for block in blocks)
        return
    path, plain = f"{folder}/{dist.get_rank()}.safetensors", f"{folder}/plain.safetensors"
    ids = torch.arange(V) * 3
    save_handoff_in_blocks(path, blocks=blocks, shape=(V, D), item_ids=ids, **common)
    sizes: dict[str, Any] = {"num_items": V, "embedding_dim": D, "vocabulary_digest": "abc"}
    got = load_handoff(path, **sizes)
    torch.testing.assert_close(got.item_table, whole, rtol=1e-4, atol=1e-5)
    save_handoff(plain, item_table=got.item_table, extra={"item_ids": ids.tolist()}, **common)
    want = load_handoff(plain, **sizes)
    assert got.header["extra"] == want.header["extra"]
    assert got.header["sem"] == want.header["sem"]
    assert got.sem_state is not None
    assert want.sem_state is not None
    for name, value in want.sem_state.items():
        assert torch.equal(got.sem_state[name], value)


@pytest.mark.parametrize(
    "option",
    [
        {"output_bias": True},
        {"action_weights": [0.5, 1.0], "num_actions": 2},
        {"feature_gate_tau": 3.0, "item_feature_codes": {"genre": torch.arange(V)}},
    ],
    ids=["bias", "weights", "gate"],
)
@pytest.mark.parametrize("tables", ["rows", "torchrec"])
def test_options_that_need_the_dense_table(tables: str, option: dict[str, Any]) -> None:
    sizes: dict[str, Any] = {"num_items": V, "embedding_dim": D, "item_events": torch.arange(V)}
    MaskedItemModel(**sizes, **option)
    name, value = next(iter(option.items()))
    words = (
        f"hpgr.MaskedItemModel.{name} = {value} takes "
        f"hpgr.MaskedItemModel.tables = 'dense', got '{tables}'"
    )
    with pytest.raises(HpgrError, match=f"^{re.escape(words)}$"):
        MaskedItemModel(**sizes, **option, tables=tables)


def test_unknown_tables() -> None:
    with pytest.raises(HpgrError, match="tables"):
        MaskedItemModel(num_items=V, embedding_dim=D, tables="sharded")
