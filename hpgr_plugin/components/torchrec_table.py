"""The item table as torchrec's EmbeddingCollection under DistributedModelParallel, row-wise."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hpgr_plugin.components.sharded_table import RowShardedTable, look_up, shard_device

# Routing of ids and rows; the lookup itself needs no kernel of fbgemm.
_OPERATORS = (
    *("asynchronous_complete_cumsum", "block_bucketize_sparse_features", "permute_1D_sparse_data"),
    *("permute_2D_sparse_data", "expand_into_jagged_permute"),
)
_NAME = "item_table"


@functools.cache
def why_no_torchrec(device: torch.device) -> str | None:
    """Why torchrec cannot shard a table on this device, or None."""
    try:
        import torchrec.distributed  # noqa: F401
    except (ImportError, OSError, AttributeError, RuntimeError) as error:
        return f"torchrec cannot be imported ({' '.join(str(error).split())})"
    key = "CUDA" if device.type == "cuda" else "CPU"
    for name in _OPERATORS:
        if not hasattr(torch.ops.fbgemm, name):
            return f"fbgemm has no {name}"
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"fbgemm::{name}", key):
            return f"fbgemm has no {name} for {key}"
    return None


class TorchrecTable(RowShardedTable):
    """`RowShardedTable` whose ids and rows torchrec routes.

    The compute kernel is torchrec's unfused one ("dense"): the tied softmax sends a gradient to
    every row, which a fused optimizer, part of the lookup's backward, would not see. The lookup in
    this process's rows is torch's own, as fbgemm's dense kernel does not return single rows on a
    CPU and is missing from small builds of fbgemm.

    Attributes:
        parallel: the DistributedModelParallel. Its state dict holds the table as a ShardedTensor
            over the same memory as `weight`. It is not a submodule: `weight` is the only parameter.
    """

    @property
    def parallel(self) -> Any:
        return self._outside[0]

    def forward(self, items: Tensor) -> Tensor:
        from torchrec import KeyedJaggedTensor

        lengths = torch.tensor([len(items)], dtype=torch.int64, device=items.device)
        ids = KeyedJaggedTensor(keys=[_NAME], values=items, lengths=lengths)
        rows: Tensor = self.parallel(ids)[_NAME].values()
        return rows.view(len(items), self.embedding_dim)

    def _empty_weight(self, shape: tuple[int, int]) -> nn.Parameter:
        with torch.random.fork_rng():  # torchrec draws rows that are drawn again, block by block
            parallel = _parallel(self.num_embeddings, self.embedding_dim)
        self._outside = (parallel,)  # a tuple: torch does not look into it
        kernel = parallel.module.collection._lookups[0]._emb_modules[0]
        weight = nn.Parameter(kernel._emb_module.weights.detach().view(shape))
        kernel._emb_module = _Rows(weight)
        return weight


class _Rows(nn.Module):
    """The lookup that takes the place of fbgemm's in torchrec's kernel."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, indices: Tensor, offsets: Tensor) -> Tensor:
        return look_up(self.weight, indices)


class _Table(nn.Module):
    def __init__(self, collection: Any) -> None:
        super().__init__()
        self.collection = collection

    def forward(self, ids: Any) -> Any:
        return self.collection(ids)


def _parallel(num_embeddings: int, embedding_dim: int) -> Any:
    """A collection of one table, its rows divided among the processes."""
    from torchrec import EmbeddingCollection, EmbeddingConfig
    from torchrec.distributed.embedding import EmbeddingCollectionSharder
    from torchrec.distributed.model_parallel import DistributedModelParallel
    from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise
    from torchrec.distributed.types import ShardingEnv, ShardingPlan

    device, world_size = shard_device(), dist.get_world_size()
    config = EmbeddingConfig(
        name=_NAME,
        embedding_dim=embedding_dim,
        num_embeddings=num_embeddings,
        feature_names=[_NAME],
    )
    table = _Table(EmbeddingCollection(tables=[config], device=torch.device("meta")))
    sharder = EmbeddingCollectionSharder()
    plan = construct_module_sharding_plan(
        table.collection,
        {_NAME: row_wise(compute_kernel="dense")},
        sharder=sharder,
        local_size=world_size,
        world_size=world_size,
        device_type=device.type,
    )
    return DistributedModelParallel(
        table,
        env=ShardingEnv.from_process_group(dist.group.WORLD),
        device=device,
        plan=ShardingPlan({"collection": plan}),
        sharders=[sharder],
        init_data_parallel=False,
    )
