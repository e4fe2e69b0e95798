"""Stage 2 with a sharded item table trains as the unsharded one on the data of all processes."""

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranker_checks import enlarge
from several_processes import in_processes, load_rows
from torch import Tensor

from hpgr_plugin.components.attention_hooks import PreferenceGuidedSparseAttention
from hpgr_plugin.components.positions import TimeAwarePositionalEncoder
from hpgr_plugin.components.sem import SessionEnhancementModule
from hpgr_plugin.components.sharded_table import RowShardedTable
from hpgr_plugin.data.batch import Batch
from hpgr_plugin.errors import HpgrError
from hpgr_plugin.hosts.embedded.model.mtgr import MTGRLayer
from hpgr_plugin.hosts.embedded.model.ranker import HSTURanker
from hpgr_plugin.hosts.embedded.model.rare_items import RareItems
from hpgr_plugin.hosts.embedded.model.rivals.dnn import DNN
from hpgr_plugin.hosts.embedded.train.shards import clip_gradients, data_parallel
from hpgr_plugin.transfer import handoff
from hpgr_plugin.transfer.handoff import HandoffError, inherit, save_handoff
from hpgr_plugin.transfer.learning_rates import parameter_groups

V, D, CLIP = 45, 16, 0.05
NO_TORCHREC = importlib.util.find_spec("torchrec") is None


class RareWithGate(RareItems):
    """Without the random replacement, which two models draw differently."""

    def __init__(self, **sizes: Any) -> None:
        super().__init__(**sizes, tau=0.0, gate_tau=4.0)


def hpgr() -> dict[str, Any]:
    return {
        "sem": SessionEnhancementModule(embedding_dim=D, num_heads=2, causal=True, gate_init=0.5),
        "positional_encoder": TimeAwarePositionalEncoder(
            embedding_dim=D, max_positions=40, form="relative"
        ),
        "attention_hook": PreferenceGuidedSparseAttention(
            top_k=2, sigma=1.0, recent=2, layout="shared_history"
        ),
    }


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "HSTU": dict,
    "HPGR": hpgr,
    # What reads the rows that were looked up needs no dense table.
    "rare items and a bias": lambda: {
        "rare_items": RareWithGate,
        "item_counts": torch.arange(V),
        "item_feature_codes": {"genre": torch.arange(V) % 5},
        "item_bias": True,
        "layer": MTGRLayer,
    },
    "a rival": lambda: {"encoder": DNN},
}


def build(case: str, tables: str) -> HSTURanker:
    torch.manual_seed(5)
    model = HSTURanker(
        num_items=V, num_actions=3, vocabulary_digest="d", embedding_dim=D, num_layers=2,
        max_history=32, dropout=0.0, tables=tables, **CASES[case](),
    )  # fmt: skip
    if tables == "dense":
        enlarge(model)
    return model


def requests(process: int, step: int) -> Batch:
    """Another number of users for every process; in one step, one has no history at all."""
    g = torch.Generator().manual_seed(100 * process + step)
    histories = [9, 0, 14 + process, 1, 5][: 3 + process % 3]
    if process == 1 and step == 1:
        histories = [0, 0]
    candidates = [2, 1, 4, 3, 2][: len(histories)]
    total, wanted = sum(histories), sum(candidates)
    return Batch(
        history_items=torch.randint(0, V, (total,), generator=g),
        history_timestamps=torch.cat([torch.arange(n) * 900 for n in histories]),
        history_actions=torch.randint(0, 3, (total,), generator=g),
        history_offsets=torch.tensor([0, *histories]).cumsum(0),
        candidate_items=torch.randint(0, V, (wanted,), generator=g),
        candidate_timestamps=torch.cat([900 * n - 450 + torch.arange(n) for n in candidates]),
        candidate_labels=torch.randint(0, 2, (wanted,), generator=g).float(),
        candidate_offsets=torch.tensor([0, *candidates]).cumsum(0),
        users=torch.arange(len(histories)),
        user_features={},
    )


def loss_of(logits: Tensor, batch: Batch) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, batch.candidate_labels, reduction="sum")


def optimizer_of(model: HSTURanker, case: str) -> torch.optim.Optimizer:
    """SGD does not forgive a gradient of the wrong size, AdamW is what the trainer has."""
    groups = parameter_groups(model, inherited=["item_table"], lr=0.5, inherited_lr_ratio=0.2)
    if case == "HPGR":
        for group in groups:
            group["lr"] /= 100
        return torch.optim.AdamW(groups, weight_decay=0.01)
    return torch.optim.SGD(groups)


@pytest.mark.parametrize(
    ("processes", "cases"),
    [
        (2, ("HSTU", "HPGR")),
        *(pytest.param(n, tuple(CASES), marks=pytest.mark.slow) for n in (2, 4)),
    ],
)
def test_training_equals_that_of_the_whole_table(processes: int, cases: tuple[str, ...]) -> None:
    in_processes(processes, check_training, cases)


def check_training(cases: tuple[str, ...]) -> None:
    """With 'rows' and 'torchrec': to start the processes takes longer than to train."""
    dist._DEFAULT_FIRST_BUCKET_BYTES = 1000  # type: ignore[attr-defined]  # two buckets of gradients
    for case in cases:
        whole = build(case, "dense")
        initial = {name: value.clone() for name, value in whole.state_dict().items()}
        wanted_losses, wanted_grads = train_whole(whole, case)
        for tables in ("rows",) if NO_TORCHREC else ("rows", "torchrec"):
            model = build(case, tables)
            kind = {"rows": "RowShardedTable", "torchrec": "TorchrecTable"}[tables]
            assert type(model.item_table).__name__ == kind
            load_rows(model.item_table, initial["item_table.weight"])
            others = {k: v for k, v in initial.items() if k != "item_table.weight"}
            model.load_state_dict(others, strict=False)
            losses, grads = train_sharded(model, case)
            close(losses, wanted_losses, 1e-5, f"{case}, {tables}: losses")
            for name, grad in wanted_grads.items():
                want = own_rows(model, grad) if name == "item_table.weight" else grad
                close(grads[name], want, 1e-5, f"{case}, {tables}: gradient of {name}")
            for name, value in whole.state_dict().items():
                want = own_rows(model, value) if name == "item_table.weight" else value
                close(model.state_dict()[name], want, 1e-4, f"{case}, {tables}: {name}")


def close(got: Tensor, want: Tensor, rtol: float, what: str) -> None:
    torch.testing.assert_close(got, want, rtol=rtol, atol=1e-5, msg=lambda text: f"{what}: {text}")


def own_rows(model: HSTURanker, table: Tensor) -> Tensor:
    sharded = model.item_table
    return table[sharded.first_row :][: len(sharded.weight)]


def train_whole(model: HSTURanker, case: str) -> tuple[Tensor, dict[str, Tensor]]:
    """One model on the batches of all processes: the losses, and the first gradients."""
    optimizer, losses, grads = optimizer_of(model, case), [], {}
    for step in range(3):
        batches = [requests(process, step) for process in range(dist.get_world_size())]
        terms = sum(batch.num_candidates for batch in batches)
        loss = sum(loss_of(model(batch), batch) for batch in batches) / terms
        optimizer.zero_grad()
        loss.backward()
        grads = grads or gradients(model)
        assert torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP) > CLIP
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), grads


def train_sharded(model: HSTURanker, case: str) -> tuple[Tensor, dict[str, Tensor]]:
    """As the trainer does it."""
    process, world = dist.get_rank(), dist.get_world_size()
    forward, optimizer, losses, grads = data_parallel(model), optimizer_of(model, case), [], {}
    for step in range(3):
        batch = requests(process, step)
        loss = loss_of(forward(batch), batch)
        sums = torch.stack([loss.detach(), torch.tensor(float(batch.num_candidates))])
        dist.all_reduce(sums)
        optimizer.zero_grad()
        (loss / sums[1] * world).backward()
        grads = grads or gradients(model)
        clip_gradients(model, CLIP)
        optimizer.step()
        losses.append(sums[0] / sums[1])
    return torch.stack(losses), grads


def gradients(model: HSTURanker) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def write_handoff(path: Path) -> tuple[Tensor, SessionEnhancementModule]:
    torch.manual_seed(9)
    table, sem = torch.randn(V, D), hpgr()["sem"]
    ids = {"item_ids": list(range(V))}
    save_handoff(
        path, item_table=table, sem=sem, vocabulary_digest="d", gap_seconds=1800, extra=ids
    )
    return table, sem


def damage(path: Path) -> None:
    """Change one byte in the last row of the table."""
    content = bytearray(path.read_bytes())
    place = content.find(write_handoff(path)[0][-1].numpy().tobytes())
    assert place > 0
    content[place] ^= 1
    path.write_bytes(content)


def test_a_handoff_is_loaded_into_shards(tmp_path: Path) -> None:
    for name in ("good", "damaged"):
        write_handoff(tmp_path / name)
    damage(tmp_path / "damaged")
    check_handoff(str(tmp_path))
    in_processes(2, check_handoff, str(tmp_path))


@pytest.mark.slow
def test_a_handoff_is_loaded_into_four_shards(tmp_path: Path) -> None:
    for name in ("good", "damaged"):
        write_handoff(tmp_path / name)
    damage(tmp_path / "damaged")
    in_processes(4, check_handoff, str(tmp_path))


def check_handoff(folder: str) -> None:
    """In blocks that begin and end inside of shards; all processes see a damage in any row."""
    before, handoff._ROWS_PER_BLOCK = handoff._ROWS_PER_BLOCK, 7
    torch.manual_seed(9)
    table, sem = torch.randn(V, D), hpgr()["sem"]
    model = build("HPGR", "rows")
    for given in (model.item_table, build("HPGR", "torchrec").item_table):
        names = inherit(f"{folder}/good", given, model.sem, "d")
        assert names == ("item_table", "sem")
        wanted = table[given.first_row :][: len(given.weight)]
        assert torch.equal(given.weight.detach(), wanted)
    for name, value in sem.state_dict().items():
        assert torch.equal(model.sem.state_dict()[name], value)
    with pytest.raises(HandoffError, match="damaged is damaged: tensor 'item_table' differs"):
        inherit(f"{folder}/damaged", model.item_table, None, "d")
    other = RowShardedTable(num_embeddings=V + 1, embedding_dim=D, std=0.02)
    with pytest.raises(HandoffError, match="num_items is 45 there, 46 here"):
        inherit(f"{folder}/good", other, None, "d")
    handoff._ROWS_PER_BLOCK = before


@pytest.mark.parametrize("tables", ["rows", "torchrec"])
def test_a_frozen_copy_needs_the_dense_table(tables: str) -> None:
    hook = PreferenceGuidedSparseAttention(top_k=2, sigma=1.0, table="frozen")
    sizes: dict[str, Any] = {"num_items": V, "num_actions": 3, "vocabulary_digest": "d"}
    HSTURanker(**sizes, attention_hook=hook)
    words = (
        "hpgr.PreferenceGuidedSparseAttention.table = 'frozen' takes "
        f"hpgr.HSTURanker.tables = 'dense', got '{tables}'"
    )
    with pytest.raises(HpgrError, match=f"^{re.escape(words)}$"):
        HSTURanker(**sizes, attention_hook=hook, tables=tables)


def test_unknown_tables() -> None:
    with pytest.raises(HpgrError, match="tables must be one of dense, torchrec, rows"):
        HSTURanker(num_items=V, num_actions=3, vocabulary_digest="d", tables="sharded")
