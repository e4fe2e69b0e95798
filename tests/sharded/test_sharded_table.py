"""Rows and softmax over shards against the whole table, in 2 and 4 processes."""

import importlib.util

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from several_processes import in_processes, load_rows
from torch import Tensor

from hpgr_plugin.components.sharded_table import RowShardedTable, build_sharded_table
from hpgr_plugin.log_once import log_once
from hpgr_plugin.ops.item_softmax import sharded_cross_entropy

D = 8
NO_TORCHREC = importlib.util.find_spec("torchrec") is None


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_shards_are_the_whole_table(processes: int) -> None:
    in_processes(processes, check_all)


def check_all() -> None:
    """One start of the processes for all checks: it takes longer than they do."""
    check_softmax()
    check_rows("rows")
    if not NO_TORCHREC:
        check_rows("torchrec")
        check_torchrec_state()


def check_softmax() -> None:
    world, rank = dist.get_world_size(), dist.get_rank()
    for V, counts in ((23, [5, 3, 0, 7]), (9, [2, 0, 4, 1]), (40, [0, 0, 0, 0])):
        g = torch.Generator().manual_seed(V)
        counts = counts[:world]
        hidden, table = (
            3 * torch.randn(n, D, generator=g, dtype=torch.float64) for n in (sum(counts), V)
        )
        targets = torch.randint(0, V, (sum(counts),), generator=g)
        hidden[:1] *= 1e3  # scores far apart
        whole = [hidden.clone().requires_grad_(), table.clone().requires_grad_()]
        scores = whole[0] @ whole[1].T
        want = F.cross_entropy(scores, targets, reduction="sum") / max(1, len(targets))
        want_grads = torch.autograd.grad(want, whole)

        own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        size = -(-V // world)
        rows = slice(min(V, rank * size), min(V, (rank + 1) * size))
        for chunk_rows in (1, 2, 100):
            queries = hidden[own].clone().requires_grad_()
            shard = table[rows].clone().requires_grad_()
            got = sharded_cross_entropy(
                queries, shard, targets[own], first_row=rows.start, num_items=V,
                chunk_bytes=chunk_rows * size * 8,
            )  # fmt: skip
            torch.testing.assert_close(got.loss, want.detach(), rtol=1e-12, atol=1e-12)
            assert got.hits == (scores[own].argmax(1) == targets[own]).sum()
            # What the processes send back adds up, whoever sends it; DDP's mean divides the table.
            share = torch.tensor([0.5, 2.0, 0.0, 1.0])[:world]
            (got.loss * share[rank]).backward()
            torch.testing.assert_close(queries.grad, share.sum() * want_grads[0][own])
            torch.testing.assert_close(shard.grad, share.mean() * want_grads[1][rows])
        with torch.no_grad():
            again = sharded_cross_entropy(
                queries, shard, targets[own], first_row=rows.start, num_items=V
            )
        torch.testing.assert_close(again.loss, want.detach())


def check_rows(kind: str) -> None:
    world, rank = dist.get_world_size(), dist.get_rank()
    for V in (101, 9):  # in 4 processes of 9 rows, the last has none
        sharded = build_sharded_table(kind, num_embeddings=V, embedding_dim=D, std=0.02)
        assert (
            type(sharded).__name__ == {"rows": "RowShardedTable", "torchrec": "TorchrecTable"}[kind]
        )
        assert [name for name, _ in sharded.named_parameters()] == ["weight"]
        table = torch.randn(V, D, generator=torch.Generator().manual_seed(1))
        load_rows(sharded, table)
        table.requires_grad_()
        total = torch.zeros(())
        for process in range(world):
            g = torch.Generator().manual_seed(process)
            count = 0 if process == 1 else 3 * process + 20
            items = torch.randint(0, V, (count,), generator=g)
            slopes = torch.randn(count, D, generator=g)
            total = total + (F.embedding(items, table) * slopes).sum() / world
            if process == rank:
                rows = sharded(items)
                torch.testing.assert_close(rows, table[items].detach())
                (rows * slopes).sum().backward()
        whole = torch.autograd.grad(total, table)[0]
        own = slice(sharded.first_row, sharded.first_row + len(sharded.weight))
        torch.testing.assert_close(sharded.weight.grad, whole[own])


def check_torchrec_state() -> None:
    """Its state dict holds the rows that the optimizer trains."""
    table = build_sharded_table("torchrec", num_embeddings=7, embedding_dim=D, std=0.02)
    optimizer = torch.optim.AdamW(table.parameters(), lr=0.1)
    table(torch.tensor([0, 6])).sum().backward()
    optimizer.step()
    (whole,) = table.parallel.state_dict().values()  # type: ignore[attr-defined]
    (shard,) = whole.local_shards()
    assert whole.size() == (7, D)
    assert shard.metadata.shard_offsets == [table.first_row, 0]
    assert torch.equal(shard.tensor, table.weight)


@pytest.mark.slow
def test_the_initial_rows_do_not_depend_on_the_processes(tmp_path) -> None:
    whole = initial_rows(None)
    assert abs(whole.std() - 0.02) < 1e-3
    in_processes(3, initial_rows, str(tmp_path))
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(3)]
    assert torch.equal(torch.cat(parts), whole)


def initial_rows(folder: str | None) -> Tensor:
    from hpgr_plugin.components import sharded_table

    torch.manual_seed(3)
    sharded_table._ROWS_PER_DRAW, before = 64, sharded_table._ROWS_PER_DRAW
    rows = RowShardedTable(num_embeddings=200, embedding_dim=D, std=0.02).weight.detach()
    sharded_table._ROWS_PER_DRAW = before
    if folder is not None:
        torch.save(rows, f"{folder}/{dist.get_rank()}.pt")
    return rows


def test_one_process_needs_no_group(caplog: pytest.LogCaptureFixture) -> None:
    log_once.cache_clear()  # another test may have caused the line
    for _ in range(2):
        table = build_sharded_table("torchrec", num_embeddings=30, embedding_dim=D, std=0.02)
    assert len(caplog.records) == 1
    assert "tables = 'torchrec' cannot be had here, 'rows' is used: " in caplog.text
    items = torch.tensor([3, 3, 29])
    assert torch.equal(table(items), table.weight[items])
    hidden, targets = torch.randn(4, D), torch.tensor([0, 1, 29, 7])
    got = sharded_cross_entropy(hidden, table.weight, targets, first_row=0, num_items=30)
    torch.testing.assert_close(got.loss, F.cross_entropy(hidden @ table.weight.T, targets))
    got.loss.backward()
    assert table.weight.grad is not None
