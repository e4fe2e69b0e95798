"""Checkpoints of a sharded training: every process writes its own rows, while training goes on.

A checkpoint is a folder `checkpoint-N`: the tensors in the format of
`torch.distributed.checkpoint`, which any number of processes can read, and `state.pt`, the rest. It
is written as `checkpoint-N.<process>.tmp` and renamed when all of it is there; only then the one
before it is removed. The folder is on a file system that all processes share.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from hpgr_plugin.components.sharded_table import RowShardedTable
from hpgr_plugin.hosts.embedded.train.checkpoint import (
    SHARDED_BEST,
    SHARDED_STATE,
    CheckpointError,
    errors_of,
    last_line,
    load_checkpoint,
    restore_generators,
    save_checkpoint,
)
from hpgr_plugin.hosts.embedded.train.distributed import Process, broadcast
from hpgr_plugin.hosts.embedded.train.run_directory import checkpoint_folders, next_checkpoint
from hpgr_plugin.hosts.embedded.train.shards import sharded_tables

LOG = logging.getLogger(__name__)
_ERRORS = (Exception, CheckpointException)  # the latter is no Exception


class ShardedCheckpoints:
    """Saves and restores a training whose model has a sharded item table.

    Args:
        directory: of the run.
        model: with a sharded table.
        optimizer: of the model's weights.
        process: this process among its peers.
    """

    def __init__(
        self,
        directory: Path,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        process: Process,
    ) -> None:
        self.directory = directory
        self.model = model
        self.optimizer = optimizer
        self.process = process
        self._tables = sharded_tables(model)
        self._mesh, self._group = _mesh_of(process), None
        if process.world_size > 1:
            # Saving runs beside the training: its messages need a group of their own, on the CPU.
            self._group = dist.new_group(backend="gloo")
        self._saving: Future[Any] | None = None

    def latest(self) -> Path | None:
        """The newest complete checkpoint, the same one on all processes."""
        return _latest(self.directory, self.process)

    def save(self, best_state: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Start to write a checkpoint; every process calls it.

        The weights may change as soon as it returns: they are copied first.

        Args:
            best_state: this process's part of the best weights.
            state: `stage` and `progress`.

        Raises:
            CheckpointError: this or the last checkpoint cannot be written.
        """
        self.wait()
        folder = next_checkpoint(self.directory)
        partial: Path = broadcast(folder.with_name(f"{folder.name}.{os.getpid()}.tmp"))
        parts: dict[str, Any] = {"model": {}, "best_model": {}, "optimizer": {}}
        save_checkpoint(partial / SHARDED_STATE, {**state, **parts}, self.process)
        tensors = self._tensors(self.model.state_dict(), best_state)
        writing = dcp.async_save(
            self._global(tensors),
            checkpoint_id=partial,
            process_group=self._group,
            no_dist=self._group is None,
        )
        assert isinstance(writing, Future)
        self._saving = _published(writing, partial, folder) if self.process.is_main else writing

    def wait(self) -> None:
        """Wait until the last checkpoint is whole.

        Raises:
            CheckpointError: it could not be written.
        """
        saving, self._saving = self._saving, None
        if saving is None:
            return
        try:
            saving.result()
        except _ERRORS as error:
            raise CheckpointError(
                f"the checkpoint in {self.directory} cannot be written: {last_line(error)}"
            ) from error

    def restore(self, path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Read a checkpoint into model and optimizer, whatever number of processes wrote it.

        Returns:
            What `save` got as `state`, with the number of processes that wrote it as
            `world_size`, and this process's part of the best weights, if there were any.

        Raises:
            CheckpointError: damaged, or of another model.
        """
        state = load_checkpoint(path / SHARDED_STATE, self.process.device)
        self._make_optimizer_state()
        weights: dict[str, Tensor] = self.model.state_dict()
        best_state: dict[str, Tensor] = {}
        with errors_of(path):
            stored = FileSystemReader(path).read_metadata().state_dict_metadata
            if any(name.startswith(SHARDED_BEST) for name in stored):  # after a validation
                best_state = {name: value.clone() for name, value in weights.items()}
            _read(path, stored, self._global(self._tensors(weights, best_state)))
            # The weights are in place; the state of a hook is a copy of what the hook has.
            self.model.load_state_dict(weights)
        self._forget_what_was_not_stored(stored)
        writers = len(state["generators"])
        if writers == self.process.world_size:
            restore_generators(path, state["generators"], self.process)
        else:
            LOG.info(
                "%s was written by %d processes and is read by %d: the masks of dropout differ",
                *(path, writers, self.process.world_size),
            )
        return {**state, "world_size": writers}, best_state

    def _tensors(
        self, weights: dict[str, Tensor], best_state: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Everything that is stored, by a name that ends with the weight's."""
        found = {f"model/{name}": value for name, value in weights.items()}
        found |= {SHARDED_BEST + name: value for name, value in best_state.items()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                found[f"optimizer.{key}/{name}"] = value
        return {name: value.detach() for name, value in found.items()}

    def _global(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return _as_parts(tensors, self._tables, self._mesh)

    def _make_optimizer_state(self) -> None:
        """AdamW makes it in its first step; here it is there to be read into."""
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                # The fused AdamW counts its steps on the device.
                device = parameter.device if group["fused"] else torch.device("cpu")
                self.optimizer.state[parameter] = {
                    "step": torch.zeros((), device=device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }

    def _forget_what_was_not_stored(self, stored: Mapping[str, Any]) -> None:
        """Weights that never had a gradient have no state."""
        for name, parameter in self.model.named_parameters():
            if f"optimizer.step/{name}" not in stored:
                self.optimizer.state.pop(parameter, None)


def load_best_weights(directory: Path, model: nn.Module, process: Process) -> None:
    """Read the best weights of a run's newest checkpoint, whatever number of processes wrote it.

    Args:
        directory: of the run.
        model: with a sharded table.
        process: this process among its peers; all of them call it.

    Raises:
        CheckpointError: there is none, or it is damaged or of another model.
    """
    path = _latest(directory, process)
    if path is None:
        raise CheckpointError(f"no checkpoint-N of a sharded training in {directory}")
    weights: dict[str, Tensor] = model.state_dict()
    named = {SHARDED_BEST + name: value.detach() for name, value in weights.items()}
    with errors_of(path):
        stored = FileSystemReader(path).read_metadata().state_dict_metadata
        _read(path, stored, _as_parts(named, sharded_tables(model), _mesh_of(process)))
        model.load_state_dict(weights)


def _latest(directory: Path, process: Process) -> Path | None:
    """The newest complete checkpoint, the same one on all processes."""
    found = checkpoint_folders(directory) if process.is_main else []
    latest: Path | None = broadcast(found[-1] if found else None)
    return latest


def _mesh_of(process: Process) -> DeviceMesh | None:
    """All processes, or None for one."""
    if process.world_size == 1:
        return None
    return init_device_mesh(process.device.type, (process.world_size,))


def _as_parts(
    tensors: Mapping[str, Tensor], tables: Mapping[str, RowShardedTable], mesh: DeviceMesh | None
) -> dict[str, Tensor]:
    """The tensors; of one that is sharded, this process's part as part of the whole."""
    parts = dict(tensors)
    for name, value in tensors.items():
        table = tables.get(name.partition("/")[2])
        if table is not None and mesh is not None and value.dim():
            shape = torch.Size((table.num_embeddings, table.embedding_dim))
            parts[name] = DTensor.from_local(
                value, mesh, [Shard(0)], run_check=False, shape=shape, stride=(shape[1], 1)
            )
    return parts


def _read(path: Path, stored: Mapping[str, Any], wanted: dict[str, Tensor]) -> None:
    """Read a checkpoint into tensors that are of its shapes."""
    _check_shapes(stored, wanted)
    wanted = {name: value for name, value in wanted.items() if name in stored}
    dcp.load(wanted, checkpoint_id=path, no_dist=not dist.is_initialized())


def _check_shapes(stored: Mapping[str, Any], wanted: Mapping[str, Tensor]) -> None:
    """All weights are there, of their shapes; moments are of the weights that had a gradient."""
    for name, value in wanted.items():
        if name in stored:
            shape = list(stored[name].size)
            if shape != list(value.shape):
                raise ValueError(f"{name} is {shape} there, {list(value.shape)} here")
        elif not name.startswith("optimizer."):
            raise ValueError(f"it has no {name}")


def _published(writing: Future[Any], partial: Path, folder: Path) -> Future[None]:
    """Ends when a written folder is the checkpoint and the ones before it are gone."""
    published: Future[None] = Future()

    def publish(written: Future[Any]) -> None:
        try:
            written.result()
            partial.rename(folder)
            for path in checkpoint_folders(folder.parent):
                if path != folder:
                    shutil.rmtree(path, ignore_errors=True)
            published.set_result(None)
        except BaseException as error:
            published.set_exception(error)

    writing.add_done_callback(publish)
    return published
