"""The hand-over in tables that torchrec divides among two processes, in every way."""

import os
import socket
from pathlib import Path
from typing import Any

import gin
import pytest
import torch
import torch.distributed as dist
from generative_recommenders.dlrm_v3.train import utils as train
from small_ranker import NUM_ITEMS, TABLE_DIM, small_config, small_tables, write_handoff
from torch import Tensor, multiprocessing
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.sharding_plan import (
    column_wise,
    construct_module_sharding_plan,
    row_wise,
    table_wise,
)
from torchrec.distributed.types import ShardingEnv, ShardingPlan
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from hpgr_plugin.hosts import dlrm_v3
from hpgr_plugin.hosts.seams import host_has_seam

pytestmark = pytest.mark.upstream

PROCESSES = 2
# Every third item is handed over, in reverse order; the others keep their initial rows.
IDS = list(range(NUM_ITEMS - 1, -1, -3))
_FUSED = "fused"  # as in the trainer; the dense kernel of a CPU writes past its memory
SHARDINGS = {
    "row_wise": (lambda: row_wise(compute_kernel=_FUSED), [[25, 16], [25, 16]]),
    "column_wise": (lambda: column_wise(ranks=[0, 1], compute_kernel=_FUSED), [[50, 8], [50, 8]]),
    "table_wise": (lambda: table_wise(rank=1, compute_kernel=_FUSED), [None, [50, 16]]),
}


def test_rows_reach_every_kind_of_shard(tmp_path: Path) -> None:
    table = torch.randn(len(IDS), TABLE_DIM)
    path = write_handoff(tmp_path / "stage1.safetensors", table, extra={"item_ids": IDS})
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    multiprocessing.start_processes(
        _in_a_process, args=(port, path, table), nprocs=PROCESSES, start_method="spawn"
    )


def _in_a_process(rank: int, port: int, path: str, table: Tensor) -> None:
    torch.set_num_threads(1)
    where = f"tcp://localhost:{port}"
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(PROCESSES), "LOCAL_RANK": str(rank)}
    dist.init_process_group("gloo", rank=rank, world_size=PROCESSES, init_method=where)
    gin.clear_config()
    dlrm_v3.attach()
    for sharding, (make, sizes) in SHARDINGS.items():
        model = _sharded(path, make())
        weight = model._embedding_collection.state_dict()["embeddings.item_table.weight"]
        shards = weight.local_shards()
        assert [list(s.tensor.shape) for s in shards] == ([sizes[rank]] if sizes[rank] else [])
        whole = torch.zeros(NUM_ITEMS, TABLE_DIM)
        for shard in shards:
            row, column = shard.metadata.shard_offsets
            rows, columns = shard.tensor.shape
            whole[row : row + rows, column : column + columns] = shard.tensor
        dist.all_reduce(whole)
        assert torch.equal(whole[IDS], table), sharding
        found = model._embedding_collection(_ids())["item"].values()
        assert torch.equal(found, table), sharding
    dist.barrier()
    dist.destroy_process_group()


def _sharded(path: str, item_table: Any) -> Any:
    """The ranking model as the trainer shards it, with this plan for the item table."""
    model = dlrm_v3.DlrmHSTU(
        small_config(), small_tables(), is_inference=False, bf16_training=False, pretrained=path
    )
    sharder = EmbeddingCollectionSharder()
    others = {
        name: table_wise(rank=0, compute_kernel=_FUSED)
        for name in small_tables()
        if name != "item_table"
    }
    plan = construct_module_sharding_plan(
        model._embedding_collection,
        {**others, "item_table": item_table},
        sharder=sharder,
        local_size=PROCESSES,
        world_size=PROCESSES,
        device_type="cpu",
    )
    train.DistributedModelParallel(
        module=model,
        env=ShardingEnv.from_process_group(dist.group.WORLD),
        device=torch.device("cpu"),
        plan=ShardingPlan({"_embedding_collection": plan}),
        sharders=[sharder],
    )
    if host_has_seam("lr_scale"):  # a patched host calls this where it shards
        model.after_sharding()
    return model


def _ids() -> KeyedJaggedTensor:
    """The handed-over items as one history, and one id of every other feature."""
    names = [name for table in small_tables().values() for name in table.feature_names]
    values = [IDS if name == "item" else [0] for name in names]
    return KeyedJaggedTensor(
        keys=names,
        values=torch.tensor([item for ids in values for item in ids]),
        lengths=torch.tensor([len(ids) for ids in values]),
    )
