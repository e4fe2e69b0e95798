"""What a user of the host gets: a whole training step of its DlrmHSTU, slots empty and filled.

The host's ranking model on its own Triton kernels, forward and backward from embedding tables to
loss, without the optimizer; 5 layers, D = 512, 4 heads of 128, tables of width 256, bfloat16.
"x host" is the host's wall time over the row's, in one process: larger is faster. "busy ms" is the
time in which a kernel runs, "launches" counts kernels per step, both from one profiled step.
"x; host's layers" and "x; no graphs" are row x with `layers = "host"` and with `capture = False`.
Tensor descriptors are off for every row, see NOTES.md. The host's kernels are tuned among all of
their configurations for the host's row of the first size, then among the fastest there.
--quick measures all sizes in one process: the row of the default layout for each, with and without
graphs, and for four sizes also empty slots and every candidate with a sequence of its own.
"""

import functools
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from examples.benchmarks import host
from examples.benchmarks.registry import measure_ceilings, print_table
from examples.benchmarks.steps import StepCost, measure_step
from hpgr_plugin.components.attention_hooks import PreferenceGuidedSparseAttention, StochasticLength

TABLE_DIM, WIDTH, LAYERS, HEADS, HEAD_DIM = 256, 512, 5, 4, 128
NUM_ITEMS, STEPS = 100_000, 9


class Size(NamedTuple):
    """Tokens of a batch, tokens of one user's sequence, and candidates among them."""

    tokens: int
    length: int
    candidates: int


SIZES = (
    Size(131072, 4096, 1),
    Size(524288, 4096, 1),
    Size(131072, 1024, 10),
    Size(131072, 1024, 1),
    Size(131072, 4096, 10),
    Size(524288, 16384, 1),
    Size(131072, 1024, 64),
    Size(131072, 4096, 64),
)
SIZES_WITH_MORE_ROWS = (*SIZES[:3], Size(524288, 16384, 1))
AUTO, EACH = "PGSA K=8 sigma=1 recent=32, auto", "PGSA K=32 sigma=2, per candidate"
HOOKS: dict[str, Callable[[], nn.Module | None]] = {
    "slots empty": lambda: None,
    AUTO: lambda: PreferenceGuidedSparseAttention(top_k=8, sigma=1.0, recent=32),
    EACH: lambda: PreferenceGuidedSparseAttention(top_k=32, sigma=2.0, layout="per_candidate"),
    "PGSA K=50 sigma=2, shared history": lambda: PreferenceGuidedSparseAttention(
        top_k=50, sigma=2.0, layout="shared_history"
    ),
    "stochastic length, alpha=1.6": lambda: StochasticLength(alpha=1.6),
}
# Rows once more with other layers than the default: their name, the row's hook, and what is bound.
OTHER_LAYERS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    (f"{AUTO}; no graphs", AUTO, {"capture": False}),
    (f"{AUTO}; host's layers", AUTO, {"layers": "host"}),
)


# What a row is called, its hook, and what is bound beside it.
Row = tuple[str, str, dict[str, Any]]
ROWS: tuple[Row, ...] = (*((name, name, {}) for name in HOOKS), *OTHER_LAYERS)
QUICK_ROWS: tuple[Row, ...] = (
    (AUTO, AUTO, {}),
    OTHER_LAYERS[0],
    (EACH, EACH, {}),
    ("slots empty", "slots empty", {}),
)


def run(*, quick: bool) -> None:
    if not host.is_there():
        print("no host checkout on PYTHONPATH: nothing to measure")
        return
    measure_ceilings()
    host.provide_torchrec_module()
    host.compile_in_parallel(12, ("dense", "weighted"))
    with tempfile.TemporaryDirectory() as folder:
        journal = Path(folder, "tuning")
        if quick:
            _measure_in_a_process(journal, "--quick", SIZES)
            return
        for size in SIZES:
            _measure_in_a_process(journal, "--all", [size])


def _measure_in_a_process(journal: Path, rows: str, sizes: Sequence[Size]) -> None:
    """Some configurations of the host's kernels end in an illegal memory access while they are
    tuned, which takes the process along: they are left out, and the sizes are measured anew."""
    numbers = [str(number) for size in sizes for number in size]
    command = [sys.executable, "-m", "examples.benchmarks.hosts", str(journal), rows, *numbers]
    for _ in range(4):
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if not done.returncode:
            return
        reason = next((x for x in reversed(done.stderr.splitlines()) if "Error" in x), "no error")
        fault = host.leave_out_last(journal) if "illegal memory access" in done.stderr else None
        print(f"\n{sizes}: {reason}" + (f"\nleft out: {fault}" if fault else ""), flush=True)
        if fault is None:
            return


def measure_sizes(journal: Path, *, quick: bool, sizes: Sequence[Size]) -> None:
    """Print, for each size, a row for the host and one for each hook."""
    host.provide_torchrec_module()
    from generative_recommenders.ops.triton import triton_hstu_preprocess_and_attention

    triton_hstu_preprocess_and_attention._should_enable_tma = lambda: False
    host.prepare_tuning(journal)
    for i, size in enumerate(sizes):
        after_host = functools.partial(host.keep_best, 3 if quick else 6, journal)
        _measure_size(size, _rows(size, quick=quick), (lambda: None) if i else after_host)


def _rows(size: Size, *, quick: bool) -> Sequence[Row]:
    if not quick:
        return ROWS
    return QUICK_ROWS if size in SIZES_WITH_MORE_ROWS else QUICK_ROWS[:2]


def _measure_size(size: Size, rows: Sequence[Row], after_host: Callable[[], None]) -> None:
    from generative_recommenders.modules.dlrm_hstu import DlrmHSTU as HostModel

    from hpgr_plugin.hosts.dlrm_v3 import DlrmHSTU

    data = make_batch(size)
    base = _measure(HostModel, size, data, {})
    table = [_row(size, "host", base, base)]
    after_host()
    try:
        for name, hook, bound in rows:
            slots = {"attention_hook": HOOKS[hook](), **bound}
            try:
                row = _row(size, name, _measure(DlrmHSTU, size, data, slots), base)
                print(f"{size} {name}: {row['x host']:.3g} x host", flush=True)
                table.append(row)
            except torch.OutOfMemoryError:
                print(f"{name}: out of memory")
                torch.cuda.empty_cache()
    finally:  # a row that fails leaves those before it
        print_table(table)


def make_batch(size: Size) -> tuple[Any, Any]:
    """Histories in order of time, and candidates that come after all of them."""
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    users, history = size.tokens // size.length, size.length - size.candidates

    def keyed(values: dict[str, Tensor], lengths: list[int]) -> Any:
        return KeyedJaggedTensor.from_lengths_sync(
            keys=list(values),
            values=torch.cat([column.flatten() for column in values.values()]),
            lengths=torch.tensor([n for n in lengths for _ in range(users)]),
        ).to("cuda")

    def draw(bound: int, per_user: int) -> Tensor:
        return torch.randint(0, bound, (users, per_user))

    torch.manual_seed(0)
    past = {
        "item": draw(NUM_ITEMS, history),
        "time": draw(10**7, history).sort(1).values,
        "action": draw(4, history),
        "watchtime": draw(100, history),
    }
    offered = {
        "candidate_item": draw(NUM_ITEMS, size.candidates),
        "candidate_time": draw(1000, size.candidates) + 10**7,
        "candidate_action": draw(2, size.candidates),
        "candidate_watchtime": draw(100, size.candidates),
    }
    return keyed(past, [history] * 4), keyed(offered, [size.candidates] * 4)


def build(model_class: type, size: Size, slots: dict[str, Any]) -> Any:
    """The host's model, or ours with slots, on CUDA with seeded weights."""
    from generative_recommenders.common import HammerKernel
    from generative_recommenders.modules.dlrm_hstu import DlrmHSTUConfig
    from generative_recommenders.modules.multitask_module import MultitaskTaskType, TaskConfig
    from torchrec.modules.embedding_configs import DataType, EmbeddingConfig

    task = TaskConfig(
        task_name="click", task_weight=1, task_type=MultitaskTaskType.BINARY_CLASSIFICATION
    )
    pairs = [(name, f"candidate_{name}") for name in ("item", "time", "action", "watchtime")]
    config = DlrmHSTUConfig(
        max_seq_len=size.length,
        max_num_candidates=size.candidates,
        hstu_num_heads=HEADS,
        hstu_attn_linear_dim=HEAD_DIM,
        hstu_attn_qk_dim=HEAD_DIM,
        hstu_attn_num_layers=LAYERS,
        hstu_embedding_table_dim=TABLE_DIM,
        hstu_preprocessor_hidden_dim=256,
        hstu_transducer_embedding_dim=WIDTH,
        hstu_input_dropout_ratio=0.0,
        hstu_linear_dropout_rate=0.0,
        contextual_feature_to_max_length={},
        candidates_weight_feature_name="candidate_action",
        candidates_watchtime_feature_name="candidate_watchtime",
        candidates_querytime_feature_name="candidate_time",
        multitask_configs=[task],
        user_embedding_feature_names=["item"],
        item_embedding_feature_names=["candidate_item"],
        uih_post_id_feature_name="item",
        uih_action_time_feature_name="time",
        uih_weight_feature_name="action",
        hstu_uih_feature_names=["item", "time", "action", "watchtime"],
        hstu_candidate_feature_names=[candidate for _, candidate in pairs],
        merge_uih_candidate_feature_mapping=pairs,
        action_weights=[1, 2],
    )
    tables = {
        "item_table": EmbeddingConfig(
            num_embeddings=NUM_ITEMS,
            embedding_dim=TABLE_DIM,
            name="item_table",
            data_type=DataType.FP32,
            feature_names=["item", "candidate_item"],
        )
    }
    torch.manual_seed(0)
    model = model_class(config, tables, is_inference=False, bf16_training=True, **slots)
    model._embedding_collection.to_empty(device="cpu")
    for weight in model._embedding_collection.parameters():
        nn.init.normal_(weight, std=0.02)
    model.set_hammer_kernel(HammerKernel.TRITON)
    return model.to("cuda").train()


def _measure(
    model_class: type, size: Size, data: tuple[Any, Any], slots: dict[str, Any]
) -> StepCost:
    """A step of the model, with the compiling and tuning before it."""
    model = build(model_class, size, slots)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        losses = model(*data)[2]
        sum(losses.values()).backward()

    cost = measure_step(step, steps=STEPS, warmup=3)
    torch.cuda.empty_cache()
    return cost


def _row(size: Size, name: str, measured: StepCost, base: StepCost) -> dict[str, object]:
    return {
        "tokens": size.tokens,
        "n": size.length,
        "candidates": size.candidates,
        "model": name,
        "x host": base.wall_ms / measured.wall_ms,
        **measured.columns(),
    }


if __name__ == "__main__":
    numbers = list(map(int, sys.argv[3:]))
    measure_sizes(
        Path(sys.argv[1]),
        quick=sys.argv[2] == "--quick",
        sizes=[Size(*numbers[i : i + 3]) for i in range(0, len(numbers), 3)],
    )
