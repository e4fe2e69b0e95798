"""Damaged hand-overs, checkpoints, run records and caches: an error that names the file.

Where the damage changes nothing that is read, what is read is what was written.
"""

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from damage import damage_one, restore
from small_run import Count

from hpgr_plugin.components.sem import SessionEnhancementModule
from hpgr_plugin.data import LastNSplit, SyntheticReader, label_column, prepare_data
from hpgr_plugin.errors import HpgrError, one_line
from hpgr_plugin.files import crc32
from hpgr_plugin.hosts.embedded.train.checkpoint import load_checkpoint, save_checkpoint
from hpgr_plugin.hosts.embedded.train.distributed import Process
from hpgr_plugin.hosts.embedded.train.run_directory import (
    RunIdentity,
    check_trained_with,
    open_run,
)
from hpgr_plugin.transfer.handoff import load_handoff, save_handoff

CASES = int(os.environ.get("HPGR_BAD_CASES", "100"))
PROCESS = Process(rank=0, world_size=1, device=torch.device("cpu"))
IDENTITY = RunIdentity(
    bindings={"hpgr.run.mode": "finetune"}, data="0" * 8, seeds=[0], world_size=1
)


class Artefact(NamedTuple):
    """Something that a run writes and reads again.

    Attributes:
        files: those that are damaged.
        load: reads it.
    """

    files: list[Path]
    load: Callable[[], Any]


def handoff(folder: Path) -> Artefact:
    path = folder / "handoff.safetensors"
    sem = SessionEnhancementModule(embedding_dim=4, num_heads=2, causal=True)
    save_handoff(
        path, item_table=torch.randn(6, 4), sem=sem, vocabulary_digest="v", gap_seconds=1800
    )

    def load() -> Any:
        loaded = load_handoff(path, num_items=6, embedding_dim=4, vocabulary_digest="v")
        return loaded.item_table, loaded.sem_state, loaded.header

    return Artefact([path], load)


def checkpoint(folder: Path) -> Artefact:
    path = folder / "checkpoint.pt"
    weights = {"w": torch.randn(4, 3)}
    state = {"stage": "finetune", "model": weights, "best_model": weights}
    state |= {"optimizer": {"state": {0: torch.randn(4, 3)}}, "progress": {"step": 3}}
    save_checkpoint(path, state, PROCESS)

    def load() -> Any:
        return load_checkpoint(path, PROCESS.device)

    return Artefact([path], load)


def run_record(folder: Path) -> Artefact:
    with open_run(folder / "run", IDENTITY, overwrite=False, process=PROCESS):
        pass

    def load() -> Any:
        check_trained_with(folder / "run", IDENTITY)

    return Artefact([folder / "run" / "run.json"], load)


def cache(folder: Path) -> Artefact:
    def load() -> Any:
        prepared = prepare_data(
            reader=SyntheticReader(num_users=4),
            label=label_column("is_click"),
            split=LastNSplit(),
            cache_dir=str(folder),
        )
        return prepared.digest(), np.array(prepared.split)

    load()
    return Artefact([path for path in folder.rglob("*/*") if path.is_file()], load)


def equal(left: Any, right: Any) -> bool:
    """Whether two nests of tensors, arrays and plain values hold the same."""
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[k], right[k]) for k in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(equal, left, right))
    if isinstance(left, torch.Tensor | np.ndarray):
        return bool((torch.as_tensor(left) == torch.as_tensor(right)).all())
    return bool(left == right)


@pytest.mark.parametrize("make", [handoff, checkpoint, run_record, cache])
def test_damage(tmp_path: Path, make: Callable[[Path], Artefact], count: Count) -> None:
    chance = random.Random(1)
    artefact = make(tmp_path)
    whole = artefact.load()
    wrong = []
    for _ in range(CASES):
        path, before = damage_one(artefact.files, chance)
        traceback = unnamed = same = 0
        try:
            same = int(equal(artefact.load(), whole))
            unnamed, message = 1 - same, "read, but other than it was written"
        except (HpgrError, OSError) as error:
            message = one_line(error)
            unnamed = int(not message.isprintable() or str(tmp_path) not in message)
        except Exception as error:
            traceback, message = 1, f"{type(error).__name__}: {error}"
        if unnamed or traceback:
            wrong.append((path.name, message))
        restore(path, before)
        count(
            make.__name__.replace("_", " "),
            cases=1,
            tracebacks=traceback,
            errors_that_name_it=1 - same - unnamed - traceback,
            errors_that_do_not=unnamed,
            read_unchanged=same,
        )
    assert not wrong, "\n".join(map(str, wrong[:20]))


@pytest.mark.parametrize(
    "content", [[], {}, "text", {"format_version": 2}, {"format_version": 1}, torch.zeros(3)]
)
def test_a_whole_file_of_torch_that_is_no_checkpoint(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "checkpoint.pt"
    torch.save(content, path)
    checksum = crc32(path)
    with path.open("ab") as file:
        file.write(f"{checksum:08x}".encode())
    with pytest.raises(HpgrError, match=str(path)):
        load_checkpoint(path, PROCESS.device)
