"""docs/scale.md shows what the script prints, and its formulas are those of real tensors."""

from pathlib import Path

import pytest
import torch

from examples.benchmarks.scale import Rates, Workload, main, plan
from hpgr_plugin.components.mim import MaskedItemModel

PAGE = Path(__file__).parents[2] / "docs" / "scale.md"


def test_the_table_of_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    table = capsys.readouterr().out.split("\n\n", 1)[1].strip()
    assert table in PAGE.read_text()


def test_table_and_checkpoint_have_the_planned_sizes() -> None:
    got = plan(Workload(items=300, gpus=1, width=16), Rates())
    table = MaskedItemModel(num_items=300, embedding_dim=16, tables="rows").item_table
    optimizer = torch.optim.AdamW(table.parameters())
    table(torch.tensor([1])).sum().backward()
    optimizer.step()
    (state,) = optimizer.state.values()
    moments = state["exp_avg"].nbytes + state["exp_avg_sq"].nbytes
    assert got.table_bytes == table.weight.nbytes
    assert got.checkpoint_bytes == 2 * table.weight.nbytes + moments
    assert got.all_to_all_bytes == 0
