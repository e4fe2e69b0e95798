"""These tests need a checkout of the host; without one they are skipped in a single line."""

import importlib.util
import socket
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import gin
import pytest

from hpgr_plugin.hosts.contract import HOST_PACKAGE, how_to_get_host

HERE = Path(__file__).parent
HOST_MISSING = importlib.util.find_spec(HOST_PACKAGE) is None


class _SkippedModule(pytest.Module):
    def collect(self) -> list[pytest.Item]:
        pytest.skip(f"no {HOST_PACKAGE}. {how_to_get_host()}", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> object:
    if HOST_MISSING and module_path.parent == HERE:
        return _SkippedModule.from_parent(parent, path=module_path)
    return None


def _add_what_older_torchrec_lacks() -> None:
    """torchrec before 1.9 has no `sorted_index_select`, which the host imports."""
    name = "torchrec.modules.sorted_index_select"
    if importlib.util.find_spec("torchrec") is None or importlib.util.find_spec(name) is not None:
        return

    def maybe_sorted_index_select(embeddings, reverse_indices, use_sorted=False):  # type: ignore[no-untyped-def]
        return embeddings.index_select(0, reverse_indices)

    module = types.ModuleType(name)
    module.maybe_sorted_index_select = maybe_sorted_index_select  # type: ignore[attr-defined]
    sys.modules[name] = module


if not HOST_MISSING:
    _add_what_older_torchrec_lacks()


@pytest.fixture
def float64_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """fbgemm's CPU build has no float64, so neither have the host's PyTorch kernels. Here the three
    operators that the host uses get it, from the project's own torch versions."""
    import torch
    from torch import Tensor

    from hpgr_plugin.ops import jagged as operator
    from hpgr_plugin.ops.jagged import torch as jagged

    fbgemm = torch.ops.fbgemm
    to_padded, to_jagged = fbgemm.jagged_to_padded_dense, fbgemm.dense_to_jagged
    add = getattr(fbgemm, "jagged_dense_elementwise_add_jagged_output", None)

    def jagged_to_padded_dense(
        values: Tensor, offsets: list[Tensor], max_lengths: list[int], padding_value: float = 0.0
    ) -> Tensor:
        if values.dtype != torch.float64:
            return to_padded(values, offsets, max_lengths, padding_value)
        return jagged.jagged_to_padded_dense(values, offsets[0], max_lengths[0], padding_value)

    def dense_to_jagged(
        dense: Tensor, offsets: list[Tensor], total_L: int | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        if dense.dtype != torch.float64:
            return to_jagged(dense, offsets, total_L)
        total = int(offsets[0][-1]) if total_L is None else total_L
        return jagged.dense_to_jagged(dense, offsets[0], total), offsets

    def jagged_dense_elementwise_add_jagged_output(
        values: Tensor, offsets: list[Tensor], dense: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        if values.dtype != torch.float64 and add is not None:
            return add(values, offsets, dense)
        return values + jagged.dense_to_jagged(dense, offsets[0], len(values)), offsets

    # The project remembers what fbgemm itself can do: it has to find out before that is changed.
    for device in ("cpu", "cuda")[: 1 + torch.cuda.is_available()]:
        row = torch.zeros(1, 1, 1, dtype=torch.float64, device=device)
        offsets = torch.tensor([0, 1], device=device)
        operator.jagged_to_padded_dense(operator.dense_to_jagged(row, offsets, 1), offsets, 1)
    monkeypatch.setattr(fbgemm, "jagged_to_padded_dense", jagged_to_padded_dense)
    monkeypatch.setattr(fbgemm, "dense_to_jagged", dense_to_jagged)
    monkeypatch.setattr(
        fbgemm,
        "jagged_dense_elementwise_add_jagged_output",
        jagged_dense_elementwise_add_jagged_output,
        raising=False,
    )


@pytest.fixture
def few_configurations() -> None:
    """Every configuration of the host's kernels must be right, the fastest is no matter in tests:
    trying all of them takes minutes of compilation."""
    from triton.runtime.autotuner import Autotuner

    for name, module in list(sys.modules.items()):
        if name.startswith("generative_recommenders.ops.triton"):
            for kernel in vars(module).values():
                if isinstance(kernel, Autotuner) and len(kernel.configs) > 3:
                    middle = len(kernel.configs) // 2
                    kernel.configs = [kernel.configs[i] for i in (0, middle, -1)]


@pytest.fixture
def no_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the host's own fused layer, see `docs/host_descriptor_fault.md`; filled slots do not use
    that layer."""
    from generative_recommenders.ops.triton import triton_hstu_preprocess_and_attention as fused

    monkeypatch.setattr(fused, "_should_enable_tma", lambda: False, raising=False)


@pytest.fixture
def gloo() -> Iterator[None]:
    """A process group of this process only."""
    from torch import distributed as dist

    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"tcp://localhost:{port}")
    yield
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def _clean_gin() -> Iterator[None]:
    yield
    gin.clear_config()
