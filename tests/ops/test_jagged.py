"""Jagged operators: against loops, and fbgemm against plain torch, in value and gradient."""

import configparser
import itertools
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hpgr_plugin.ops import jagged
from hpgr_plugin.ops.dispatch import set_backends
from hpgr_plugin.ops.jagged import fbgemm, naive

ROOT = Path(__file__).parents[2]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
OFFSET_DTYPES = [torch.int32, torch.int64]
INNER = [(), (3,), (2, 3)]
WIDTHS = [0, 1, 4, 70]


@pytest.fixture
def plain_torch() -> Iterator[None]:
    set_backends({"jagged": "torch"})
    yield
    set_backends()


@pytest.fixture(params=["fbgemm", "torch", "naive"])
def jagged_backend(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.param == "fbgemm":
        pytest.importorskip("fbgemm_gpu")
    set_backends({"jagged": request.param})
    yield
    set_backends()


def loop_pad(values: Tensor, offsets: Tensor, max_length: int, padding: float) -> Tensor:
    inner = values.shape[1:]
    flat = values.reshape(len(values), inner.numel())
    padded = naive.jagged_to_padded_dense(flat, offsets, max_length, padding)
    return padded.view(len(offsets) - 1, max_length, *inner)


def loop_unpad(dense: Tensor, offsets: Tensor) -> Tensor:
    inner, total = dense.shape[2:], int(offsets[-1])
    flat = dense.reshape(*dense.shape[:2], inner.numel())
    return naive.dense_to_jagged(flat, offsets, total).view(total, *inner)


def gradient(output: Tensor, source: Tensor, weights: Tensor) -> Tensor:
    # A source without influence has gradient zero, which autograd reports as None.
    (grad,) = torch.autograd.grad((output * weights).sum(), source, allow_unused=True)
    return torch.zeros_like(source) if grad is None else grad


@pytest.mark.parametrize("offset_dtype", OFFSET_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fbgemm", [True, False], ids=["fbgemm-if-there", "torch"])
class TestAgainstLoops:
    @pytest.fixture(autouse=True)
    def _backend(self, fbgemm: bool, request: pytest.FixtureRequest) -> None:
        if not fbgemm:
            request.getfixturevalue("plain_torch")

    def test_pad(self, lengths, offsets_of, dtype, offset_dtype):
        offsets = offsets_of(lengths, offset_dtype)
        for inner, max_length in itertools.product(INNER, WIDTHS):
            values = torch.randn(sum(lengths), *inner).to(dtype).requires_grad_()
            got = jagged.jagged_to_padded_dense(values, offsets, max_length, -2.0)
            want = loop_pad(values, offsets, max_length, -2.0)
            assert got.dtype == dtype
            assert torch.equal(got, want)
            weights = torch.randn(want.shape).to(dtype)
            if values.numel():
                assert torch.equal(gradient(got, values, weights), gradient(want, values, weights))

    def test_unpad(self, lengths, offsets_of, dtype, offset_dtype):
        offsets = offsets_of(lengths, offset_dtype)
        for inner, width in itertools.product(INNER, WIDTHS):
            dense = torch.randn(len(lengths), width, *inner).to(dtype).requires_grad_()
            got = jagged.dense_to_jagged(dense, offsets, sum(lengths))
            want = loop_unpad(dense, offsets)
            assert got.dtype == dtype
            assert torch.equal(got, want)
            weights = torch.randn(want.shape).to(dtype)
            if dense.numel() and want.numel():
                assert torch.equal(gradient(got, dense, weights), gradient(want, dense, weights))

    def test_round_trip(self, lengths, offsets_of, dtype, offset_dtype):
        offsets = offsets_of(lengths, offset_dtype)
        values = torch.randn(sum(lengths), 3).to(dtype)
        dense = jagged.jagged_to_padded_dense(values, offsets, max(lengths, default=0))
        assert torch.equal(jagged.dense_to_jagged(dense, offsets, len(values)), values)


@pytest.mark.parametrize("lengths", [[3, 0, 2], [0, 0]], ids=str)
def test_values_past_the_last_row_stay_out(lengths, jagged_backend, offsets_of):
    """A buffer may be longer than its rows; what lies behind them may be anything."""
    offsets, owned, width = offsets_of(lengths), sum(lengths), 2
    values = torch.randn(owned + 3, 4)
    values[owned:] = float("nan")
    values.requires_grad_()
    dense = jagged.jagged_to_padded_dense(values, offsets, width)
    want = naive.jagged_to_padded_dense(values[:owned], offsets, width, 0.0)
    assert torch.equal(dense, want)
    assert not gradient(dense, values, torch.ones_like(dense))[owned:].any()

    dense = torch.randn(len(lengths), width, 4, requires_grad=True)
    back = jagged.dense_to_jagged(dense, offsets, owned + 3)
    assert torch.equal(back[:owned], naive.dense_to_jagged(dense, offsets, owned))
    assert back.shape == (owned + 3, 4)
    assert not back[owned:].any()
    if owned:
        want = naive.dense_to_jagged(dense, offsets, owned)
        weights = torch.randn_like(back)
        assert torch.equal(gradient(back, dense, weights), gradient(want, dense, weights[:owned]))


@pytest.mark.parametrize("offset_dtype", OFFSET_DTYPES, ids=str)
@pytest.mark.parametrize("fbgemm", [True, False], ids=["fbgemm-if-there", "torch"])
def test_complete_cumsum(lengths, offsets_of, offset_dtype, fbgemm, request):
    if not fbgemm:
        request.getfixturevalue("plain_torch")
    got = jagged.complete_cumsum(torch.tensor(lengths, dtype=offset_dtype))
    assert got.dtype == offset_dtype
    assert torch.equal(got, offsets_of(lengths, offset_dtype))
    assert torch.equal(got, naive.complete_cumsum(torch.tensor(lengths, dtype=offset_dtype)))


def test_fbgemm_is_used_where_it_loads():
    pytest.importorskip("fbgemm_gpu")
    fbgemm._why_not.cache_clear()
    with torch.inference_mode():  # the first call decides for all that follow
        jagged.jagged_to_padded_dense(torch.ones(2, 1), torch.tensor([0, 2]), 2)
    assert fbgemm.why_not_jagged_to_padded_dense(torch.ones(1, 1)) is None
    assert fbgemm.why_not_dense_to_jagged(torch.ones(1, 1, 1).bfloat16()) is None
    assert fbgemm.why_not_complete_cumsum(torch.ones(1, dtype=torch.int64)) is None


def test_what_is_not_a_number_in_a_cut_tail_stays_out(offsets_of, plain_torch):
    values = torch.tensor([[1.0], [float("nan")], [3.0]], requires_grad=True)
    dense = jagged.jagged_to_padded_dense(values, offsets_of([2, 1]), 1)
    assert torch.equal(dense, torch.tensor([[[1.0]], [[3.0]]]))
    assert torch.equal(gradient(dense, values, torch.ones(2, 1, 1)).T, torch.tensor([[1.0, 0, 1]]))


@pytest.mark.parametrize("offset_dtype", OFFSET_DTYPES, ids=str)
def test_segments(lengths, offsets_of, offset_dtype):
    offsets = offsets_of(lengths, offset_dtype)
    ids = jagged.segment_ids(offsets, sum(lengths))
    positions = jagged.segment_positions(offsets, sum(lengths))
    assert ids.dtype == positions.dtype == torch.int64
    assert ids.tolist() == [b for b, n in enumerate(lengths) for _ in range(n)]
    assert positions.tolist() == [i for n in lengths for i in range(n)]


@pytest.mark.parametrize("dtype", OFFSET_DTYPES, ids=str)
def test_ranges(lengths, dtype):
    starts = torch.randint(0, 100, (len(lengths),), dtype=dtype)
    got = jagged.ranges(starts, torch.tensor(lengths, dtype=dtype))
    assert got.dtype == torch.int64
    want = [s + i for s, n in zip(starts.tolist(), lengths, strict=True) for i in range(n)]
    assert got.tolist() == want


def test_check_sorted_names_the_row(offsets_of):
    offsets = offsets_of([2, 0, 3])
    jagged.check_sorted(torch.tensor([5, 5, 1, 2, 2]), offsets, "times")
    with pytest.raises(ValueError, match=r"times must ascend.*row 2.*position 4 is 1 after 2"):
        jagged.check_sorted(torch.tensor([5, 5, 1, 2, 1]), offsets, "times")


@pytest.mark.parametrize(
    "offsets", [torch.tensor([0.0, 2.0]), torch.tensor([[0, 2]]), torch.empty(0)]
)
def test_offsets_of_another_kind_are_an_error(offsets):
    with pytest.raises(
        ValueError, match=r"offsets must be an int32 or int64 tensor \[B \+ 1\], got"
    ):
        jagged.jagged_to_padded_dense(torch.zeros(2, 1), offsets, 2)
    with pytest.raises(
        ValueError, match=r"offsets must be an int32 or int64 tensor \[B \+ 1\], got"
    ):
        jagged.dense_to_jagged(torch.zeros(1, 2, 1), offsets, 2)


def test_versions_are_those_of_setup_cfg():
    text = (ROOT / "setup.cfg").read_text()
    pairs = dict(re.findall(r"torch (\d+\.\d+) <-> fbgemm (\d+\.\d+)", text))
    assert pairs == fbgemm.TORCH_TO_FBGEMM
    config = configparser.ConfigParser()
    config.read_string(text)
    for extra in ("cpu", "cuda"):
        pins = config["options.extras_require"][extra]
        torch_version, fbgemm_version = (
            re.search(pattern, pins).group(1)
            for pattern in (r"torch==(\d+\.\d+)", r"fbgemm-gpu(?:-cpu)?==(\d+\.\d+)")
        )
        assert fbgemm.TORCH_TO_FBGEMM[torch_version] == fbgemm_version


USE_TWICE = """
import logging, sys, warnings
logging.getLogger().setLevel(logging.INFO)
import torch
from hpgr_plugin.ops import jagged
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        offsets = jagged.complete_cumsum(torch.tensor([1, 2]))
        dense = jagged.jagged_to_padded_dense(torch.ones(3, 1), offsets, 2)
assert offsets.tolist() == [0, 1, 3] and dense.sum() == 3
said = [str(w.message) for w in caught if "jagged operators run in plain torch" in str(w.message)]
root = logging.getLogger()
print(len(said), root.level, len(root.handlers), "fbgemm_gpu" in sys.modules, *said, sep="|")
"""


def use_twice(**environment: str) -> list[str]:
    path = os.pathsep.join([environment.pop("PYTHONPATH", ""), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", USE_TWICE],
        env={**os.environ, **environment, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip().split("|")


def test_a_build_that_does_not_load_is_one_warning(tmp_path):
    (tmp_path / "fbgemm_gpu").mkdir()
    (tmp_path / "fbgemm_gpu" / "__init__.py").write_text("raise OSError('undefined symbol: _ZN3')")
    count, level, handlers, _, said = use_twice(PYTHONPATH=str(tmp_path))
    assert (count, level, handlers) == ("1", "20", "0")
    for torch_version, fbgemm_version in fbgemm.TORCH_TO_FBGEMM.items():
        assert f"torch {torch_version} with fbgemm {fbgemm_version}" in said


def test_the_root_logger_is_left_alone():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("fbgemm_gpu")
    assert use_twice() == ["0", "20", "0", "True"]


def test_plain_torch_by_choice_is_silent():
    assert use_twice(HPGR_BACKENDS="jagged=torch") == ["0", "20", "0", "False"]
