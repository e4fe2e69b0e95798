"""Exported programs give the model's probabilities on other shapes than they were traced with."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from small_models import DIM, HOOKS, ITEMS, pgsa, ranker, requests
from small_requests import requests_of

from hpgr_plugin.components.attention_hooks import (
    AttentionHook,
    PreferenceGuidedSparseAttention,
    StochasticLength,
)
from hpgr_plugin.hosts.embedded.model.hstu import HSTULayer, SequenceLayer
from hpgr_plugin.hosts.embedded.model.mtgr import MTGRLayer
from hpgr_plugin.hosts.embedded.model.ranker import HSTURanker
from hpgr_plugin.hosts.embedded.report.evaluation import Task
from hpgr_plugin.serving import Scorer, package
from hpgr_plugin.serving.package import why_not_loaded, write_program
from hpgr_plugin.serving.program import (
    PaddedRanker,
    ProgramError,
    ProgramInputs,
    export_program,
    pad_history,
    shortest_history,
)
from hpgr_plugin.serving.requests import batch_of

SHAPES = [([40, 0, 7, 100], 6), ([3], 1), ([10] * 9, 33), ([0, 0], 2)]
EXPORTED = [name for name in HOOKS if name not in ("frozen", "stochastic length")]


def compare(
    run: Callable[..., torch.Tensor],
    model: HSTURanker,
    shapes: list[tuple[list[int], int]] = SHAPES,
    device: str = "cpu",
) -> None:
    for inputs, expected in inputs_and_outputs(model, shapes, device):
        torch.testing.assert_close(run(*inputs).flatten(), expected, rtol=0, atol=1e-5)


def inputs_and_outputs(
    model: HSTURanker, shapes: list[tuple[list[int], int]] = SHAPES, device: str = "cpu"
) -> Iterator[tuple[ProgramInputs, torch.Tensor]]:
    """What a program is given, and the model's own probabilities."""
    for lengths, count in shapes:
        for one_time in (True, False):
            batch = requests(lengths, [count] * len(lengths), one_time=one_time).to(device)
            inputs = pad_history(ProgramInputs.of(batch), shortest_history(model))
            yield inputs, model(batch).sigmoid()


@pytest.mark.parametrize("relative_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("hook", EXPORTED)
@pytest.mark.parametrize("layer", [HSTULayer, MTGRLayer])
@torch.no_grad()
def test_the_padded_model_equals_the_trained_one(
    layer: type[SequenceLayer], hook: str, relative_bias: bool
) -> None:
    model = ranker(layer, HOOKS[hook](), relative_bias=relative_bias)
    compare(PaddedRanker(model).eval(), model)


@pytest.mark.parametrize(
    ("layer", "hook"), [(HSTULayer, "dense"), (HSTULayer, "recent"), (MTGRLayer, "paper")]
)
@torch.no_grad()
def test_the_exported_program_takes_any_shape(
    layer: type[SequenceLayer], hook: str, tmp_path: Path
) -> None:
    model = ranker(layer, HOOKS[hook]())
    program = export_program(model)
    path = str(tmp_path / "model.pt2")
    torch.export.save(program, path)
    compare(torch.export.load(path).module(), model)


def compare_package(model: HSTURanker, folder: Path, device: str = "cpu") -> None:
    """Compile the model, and run the package in a process that loads the system's libstdc++ first.

    Else loading any package ends in a segmentation fault on some machines.
    """
    path = torch._inductor.aoti_compile_and_package(
        export_program(model), package_path=str(folder / "model.pt2")
    )
    cases = [(list(inputs), wanted) for inputs, wanted in inputs_and_outputs(model, device=device)]
    torch.save(cases, folder / "cases.pt")
    library = subprocess.run(
        ["g++", "-print-file-name=libstdc++.so.6"], capture_output=True, text=True, check=True
    ).stdout.strip()
    subprocess.run(
        [sys.executable, "-c", _RUN_PACKAGE, path, str(folder / "cases.pt")],
        env={**os.environ, "LD_PRELOAD": library},
        check=True,
    )


_RUN_PACKAGE = """
import sys, torch
package, cases = sys.argv[1:]
run = torch._inductor.aoti_load_package(package)
for inputs, expected in torch.load(cases):
    torch.testing.assert_close(run(*inputs).flatten(), expected, rtol=0, atol=1e-5)
"""


def test_a_package_that_cannot_be_loaded_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "broken.pt2"
    path.write_bytes(b"no package")
    assert str(path) in (why_not_loaded(path) or "")
    monkeypatch.setattr(package, "_LOAD", "import os; os.kill(os.getpid(), 11)")
    assert "LD_PRELOAD" in (why_not_loaded(path) or "")


@pytest.mark.slow
@torch.no_grad()
def test_the_compiled_package_takes_any_shape(tmp_path: Path) -> None:
    compare_package(ranker(HSTULayer, HOOKS["recent"]()), tmp_path)
    assert why_not_loaded(tmp_path / "model.pt2") is None


@pytest.mark.gpu
@torch.no_grad()
def test_on_a_gpu(tmp_path: Path) -> None:
    model = ranker(HSTULayer, HOOKS["recent"]()).cuda()
    compare(export_program(model).module(), model, device="cuda")
    compare_package(model, tmp_path, device="cuda")


@pytest.mark.parametrize(
    ("hook", "sem", "name"),
    [
        (lambda: None, True, "HSTURanker.sem"),
        (lambda: PreferenceGuidedSparseAttention(), False, "layout = 'per_candidate'"),
        (lambda: pgsa(table="frozen"), False, "table = 'frozen'"),
        (lambda: StochasticLength(alpha=1.5), False, "HSTURanker.attention_hook"),
    ],
)
def test_what_has_no_fixed_shapes_is_refused_by_name(
    hook: Callable[[], AttentionHook | None], sem: bool, name: str
) -> None:
    model = ranker(hook=hook(), sem=sem)
    if "frozen" in name:
        model.attention_hook.freeze(torch.randn(ITEMS, DIM))  # type: ignore[union-attr]
    with pytest.raises(ProgramError, match=name) as raised:
        export_program(model)
    assert "\n" not in str(raised.value)


def test_a_part_that_is_not_known_is_refused() -> None:
    model = ranker()
    model.new_part = torch.nn.Linear(2, 2)
    with pytest.raises(ProgramError, match=r"HSTURanker\.new_part has no form"):
        export_program(model)


def test_requests_with_unlike_candidates_are_refused() -> None:
    with pytest.raises(ProgramError, match=r"equally many candidates, got \[1, 3\]"):
        ProgramInputs.of(requests([3, 4], [1, 3]))


@pytest.mark.parametrize("row", ["base_relative", "pgsa_recent_shared"])
def test_a_served_folder_becomes_a_program(
    row: str, trained: Callable[..., tuple[Task, Path]], tmp_path: Path
) -> None:
    task, folder = trained(row)
    write_program(folder, tmp_path / "model.pt2")
    run = torch.export.load(str(tmp_path / "model.pt2")).module()
    scorer = Scorer.load(folder, device="cpu", cache_mib=0)
    for request in requests_of(task.data, task.requests)[:5]:
        (answer,) = scorer.score([request])
        inputs = ProgramInputs.of(batch_of([scorer.encode(request)]))
        inputs = pad_history(inputs, shortest_history(scorer.model))
        expected = torch.from_numpy(answer.probabilities)
        with torch.no_grad():
            probabilities = run(*inputs)[0]
        torch.testing.assert_close(probabilities, expected, rtol=0, atol=1e-5)
