"""Checkpoints of a sharded training: other numbers of processes, asynchronous, killed."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from several_processes import in_processes
from torch import nn
from torch.distributed.checkpoint import filesystem

from hpgr_plugin.components.attention_hooks import StochasticLength
from hpgr_plugin.components.mim import MaskedItemModel
from hpgr_plugin.hosts.embedded.model.ranker import HSTURanker
from hpgr_plugin.hosts.embedded.train.checkpoint import CheckpointError, load_checkpoint
from hpgr_plugin.hosts.embedded.train.distributed import Process
from hpgr_plugin.hosts.embedded.train.run_directory import (
    CHECKPOINT,
    RunIdentity,
    checkpoint_folders,
    next_checkpoint,
    open_run,
)
from hpgr_plugin.hosts.embedded.train.sharded_checkpoint import (
    ShardedCheckpoints,
    load_best_weights,
)

V, D = 45, 16
STATE = {"stage": "pretrain", "progress": {"step": 3}}


def make(folder: Path, *, stage: int = 1, num_items: int = V) -> ShardedCheckpoints:
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    torch.manual_seed(world)
    sizes: dict[str, Any] = {"num_items": num_items, "embedding_dim": D, "num_layers": 1}
    model: nn.Module
    if stage == 1:
        model = MaskedItemModel(**sizes, tables="rows")
    else:
        sizes |= {"num_actions": 2, "vocabulary_digest": "", "max_history": 8}
        # Its hook has a state that is no weight: what it draws next.
        model = HSTURanker(**sizes, attention_hook=StochasticLength(alpha=1.2), tables="rows")
    return ShardedCheckpoints(
        folder,
        model=model,
        optimizer=torch.optim.AdamW(model.parameters()),
        process=Process(rank, world, torch.device("cpu")),
    )


def numbered(checkpoints: ShardedCheckpoints, offset: float) -> dict[str, torch.Tensor]:
    """Weights, moments and best weights say what they are and, in the table, which row."""
    table = checkpoints.model.item_table
    rows = (table.first_row + torch.arange(len(table.weight.detach())))[:, None].expand(-1, D)
    if isinstance(checkpoints.model, HSTURanker):
        checkpoints.model.attention_hook._generator.manual_seed(int(abs(offset)))
    best = {name: value.clone() for name, value in checkpoints.model.state_dict().items()}
    for number, (name, parameter) in enumerate(checkpoints.model.named_parameters()):
        what = rows if name == "item_table.weight" else torch.full(parameter.shape, number)
        with torch.no_grad():
            parameter.copy_(what + offset)
        if number != 1:  # a weight that never had a gradient
            checkpoints.optimizer.state[parameter] = {
                "step": torch.tensor(offset),
                "exp_avg": parameter.detach() + 0.25,
                "exp_avg_sq": parameter.detach() + 0.5,
            }
        best[name] = parameter.detach() + 0.75
    return best


def save(folder: str, stage: int = 1) -> None:
    checkpoints = make(Path(folder), stage=stage)
    for offset in (100.0, 200.0):
        best = numbered(checkpoints, offset)
        checkpoints.save(best, STATE)
        numbered(checkpoints, -1.0)  # training goes on while it is written
        for value in best.values():
            value.fill_(1)
    checkpoints.wait()


def check(folder: str, stage: int = 1) -> None:
    checkpoints = make(Path(folder), stage=stage)
    path = checkpoints.latest()
    assert path is not None
    assert path.name == "checkpoint-2"
    state, best = checkpoints.restore(path)
    assert state["progress"] == STATE["progress"]
    assert state["world_size"] == 2
    wanted = make(Path(folder), stage=stage)
    wanted_best = numbered(wanted, 200.0)
    pairs: list[tuple[Any, Any]] = [(best, wanted_best)]
    pairs.append((checkpoints.model.state_dict(), wanted.model.state_dict()))
    states = [
        {
            f"{name}.{key}": value
            for name, parameter in which.model.named_parameters()
            for key, value in which.optimizer.state.get(parameter, {}).items()
        }
        for which in (checkpoints, wanted)
    ]
    for got, want in [*pairs, tuple(states)]:
        assert got.keys() == want.keys()
        for name, value in want.items():
            assert torch.equal(got[name], value), name


@pytest.mark.parametrize("stage", [1, 2])
def test_written_by_two_read_by_one(tmp_path: Path, stage: int) -> None:
    in_processes(2, save, str(tmp_path), stage)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    check(str(tmp_path), stage)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_written_by_two_read_by_two_and_four(tmp_path: Path, stage: int) -> None:
    in_processes(2, save, str(tmp_path), stage)
    in_processes(2, check, str(tmp_path), stage)
    in_processes(4, check, str(tmp_path), stage)


def test_before_the_first_validation(tmp_path: Path) -> None:
    """There are no best weights yet."""
    checkpoints = make(tmp_path)
    numbered(checkpoints, 1.0)
    checkpoints.save({}, STATE)
    checkpoints.wait()
    assert load_checkpoint(tmp_path / CHECKPOINT, torch.device("cpu"))["best_model"] == {}
    with pytest.raises(CheckpointError, match=r"checkpoint-1 .*: it has no best_model/"):
        load_best_weights(tmp_path, checkpoints.model, checkpoints.process)
    assert checkpoints.restore(checkpoint_folders(tmp_path)[0])[1] == {}


def test_of_another_model_or_damaged(tmp_path: Path) -> None:
    checkpoints = make(tmp_path)
    checkpoints.save(numbered(checkpoints, 1.0), STATE)
    checkpoints.wait()
    (path,) = checkpoint_folders(tmp_path)
    shapes = (
        rf"another model: model/item_table\.weight is \[{V}, {D}\] there, \[{V + 1}, {D}\] here"
    )
    with pytest.raises(CheckpointError, match=shapes):
        make(tmp_path, num_items=V + 1).restore(path)
    (path / ".metadata").write_bytes(b"")
    with pytest.raises(CheckpointError, match="checkpoint-1 is damaged or of another model"):
        checkpoints.restore(path)
    with pytest.raises(CheckpointError, match="checkpoint-1 is damaged or of another model"):
        load_checkpoint(tmp_path / CHECKPOINT, torch.device("cpu"))
    (path / "state.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"state\.pt is damaged"):
        checkpoints.restore(path)


def test_folders_of_other_names_are_no_checkpoints(tmp_path: Path) -> None:
    """Nor are they removed by a run that starts anew."""
    for name in ("checkpoint-best", "checkpoint-9", "checkpoint-10", "checkpoint-11.5.tmp"):
        (tmp_path / name).mkdir()
    assert [path.name for path in checkpoint_folders(tmp_path)] == ["checkpoint-9", "checkpoint-10"]
    assert next_checkpoint(tmp_path).name == "checkpoint-11"
    process = Process(0, 1, torch.device("cpu"))
    with open_run(tmp_path, RunIdentity({}, "0", [0], 1), overwrite=True, process=process) as state:
        assert state == "new"
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-best"]


def test_a_failed_save_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full when the tensors are written."""
    checkpoints = make(tmp_path)
    best = numbered(checkpoints, 1.0)
    checkpoints.save(best, STATE)
    checkpoints.wait()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(filesystem, "_write_files_from_queue", full)
    checkpoints.save(best, STATE)
    with pytest.raises(CheckpointError, match=r"cannot be written: .*No space left"):
        checkpoints.wait()
    assert [path.name for path in checkpoint_folders(tmp_path)] == ["checkpoint-1"]
