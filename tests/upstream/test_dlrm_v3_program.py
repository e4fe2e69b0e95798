"""Programs of the host's ranker with filled slots predict what the model predicts, in any shape."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from generative_recommenders.common import HammerKernel
from small_ranker import batch, small_config, small_tables
from test_dlrm_v3_inference import HOOKS, model_of
from torch.fx import GraphModule

from hpgr_plugin.components.attention_hooks import AttentionHook, PreferenceGuidedSparseAttention
from hpgr_plugin.errors import HpgrError
from hpgr_plugin.hosts.dlrm_v3 import DlrmHSTU
from hpgr_plugin.hosts.dlrm_v3.program import (
    DenseInputs,
    DenseRanker,
    WholeInputs,
    WholeRanker,
    export_program,
)

pytestmark = pytest.mark.upstream

EXAMPLE = [7, 3, 5, 12], [2, 1, 3, 2]
SHAPES = [
    ([7, 1, 4, 12], [2, 1, 3, 2]),
    ([30, 9], [4, 4]),
    ([1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 6, 7]),
    ([3, 0], [1, 1]),
]
ONE_USER = [5], [3]
PGSA = PreferenceGuidedSparseAttention
MORE: dict[str, Callable[[], AttentionHook]] = {
    "before the gate": lambda: PGSA(top_k=3, mask_position="pre", layout="per_candidate"),
    "cosine, recent": lambda: PGSA(top_k=2, recent=3, score="cosine", layout="shared_history"),
}


def compare(program: Callable[..., Any], model: Any, inputs: Callable[..., Any]) -> None:
    for lengths, candidates in SHAPES:
        for later in (True, False):
            data = batch(lengths, candidates, seed=3, later=later)
            expected = model(*data)[3]
            found = program(*inputs(*data))
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    with pytest.raises(AssertionError, match="Guard failed"):  # not a wrong answer
        program(*inputs(*batch(*ONE_USER)))
    twice = [part * 2 for part in ONE_USER]
    data = batch(*twice)
    torch.testing.assert_close(program(*inputs(*data)), model(*data)[3], rtol=0, atol=1e-5)


CASES = [*((kind, False) for kind in [*HOOKS, *MORE]), ("per_candidate", True), ("none", True)]


@pytest.mark.parametrize(("kind", "own_session"), CASES)
@torch.no_grad()
def test_the_dense_part_as_a_program(
    kind: str, own_session: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, hook in MORE.items():
        monkeypatch.setitem(HOOKS, name, hook)
    model = model_of(kind, is_inference=True, own_session=own_session)

    def inputs(*data: Any) -> DenseInputs:
        return DenseInputs.of(model.preprocess(*data))

    program = export_program(DenseRanker(model), inputs(*batch(*EXAMPLE, later=False)))
    compare(program.module(), model, inputs)
    graphs = [part for part in program.graph_module.modules() if isinstance(part, GraphModule)]
    names = {str(node.target) for part in graphs for node in part.graph.nodes}
    assert "hpgr.session_context.default" in names  # the slots are in it
    assert "hpgr.count_earlier.default" in names


@pytest.mark.parametrize("kind", ["per_candidate", "shared_history"])
@torch.no_grad()
def test_the_whole_ranker_as_a_program(kind: str, tmp_path: Path) -> None:
    """From a file, in a process that has no model."""
    model = model_of(kind, is_inference=True)
    history, candidates = batch(*EXAMPLE, later=False)

    def inputs(*data: Any) -> WholeInputs:
        return WholeInputs.of(model, *data)

    ranker = WholeRanker(model, history.keys(), candidates.keys())
    program = export_program(ranker, inputs(history, candidates))
    compare(program.module(), model, inputs)

    torch.export.save(program, tmp_path / "ranker.pt2")
    data = batch([9, 2, 4], [2, 2, 5], seed=8)
    torch.save((tuple(inputs(*data)), model(*data)[3]), tmp_path / "case.pt")
    script = (
        "import torch, hpgr_plugin.hosts.dlrm_v3.program\n"
        "inputs, expected = torch.load('case.pt')\n"
        "with torch.no_grad():\n"
        "    found = torch.export.load('ranker.pt2').module()(*inputs)\n"
        "torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@torch.no_grad()
def test_the_model_is_as_before_after_an_export() -> None:
    model = model_of("per_candidate", is_inference=True)
    data = batch(*EXAMPLE)
    before = model(*data)[3]
    export_program(DenseRanker(model), DenseInputs.of(model.preprocess(*data)))
    assert torch.equal(model(*data)[3], before)
    assert not {"int", "len"} & vars(sys.modules[DlrmHSTU.__module__]).keys()


def test_another_mode_is_refused() -> None:
    with pytest.raises(HpgrError, match="is_inference=True, in eval"):
        DenseRanker(model_of("none", is_inference=False))
    model = DlrmHSTU(small_config(), small_tables(), is_inference=True).eval()
    model.set_hammer_kernel(HammerKernel.TRITON)
    with pytest.raises(HpgrError, match=r"set_hammer_kernel\(HammerKernel.PYTORCH\)"):
        DenseRanker(model)


@pytest.mark.parametrize("kind", ["none", "per_candidate", "shared_history"])
@torch.no_grad()
def test_a_jit_trace_with_filled_slots_is_refused(kind: str) -> None:
    model = model_of(kind, is_inference=True)
    inputs = DenseInputs.of(model.preprocess(*batch(*EXAMPLE)))
    with pytest.raises(HpgrError, match=r"torch.jit.trace cannot record hpgr.DlrmHSTU"):
        torch.jit.trace(DenseRanker(model), tuple(inputs), strict=False)
