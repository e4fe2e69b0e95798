"""The host's own layers on its Triton kernels, with the weights of ours, where there is a host."""

import functools
import importlib
import importlib.util
import subprocess
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.benchmarks.registry import time_ms
from hpgr_plugin.components.hstu_stack import HSTUStack

_PACKAGE = "generative_recommenders"
_ALL_CONFIGURATIONS: dict[str, list[Any]] = {}


def is_there() -> bool:
    """Whether a host checkout is on PYTHONPATH."""
    return importlib.util.find_spec(_PACKAGE) is not None


class HostStack:
    """Dense layers, or layers whose value rows are scaled, on the host's kernels.

    On Hopper the host's layer chooses loads by tensor descriptors, and describes the slices q, k
    and v of its projection as if they were tensors of their own: it reads other rows than it
    should. `descriptors=False` has it use plain loads, which are right.
    """

    def __init__(self, stack: HSTUStack, *, descriptors: bool = False) -> None:
        self.descriptors = descriptors
        provide_torchrec_module()
        from generative_recommenders.common import HammerKernel
        from generative_recommenders.modules.stu import STULayer, STULayerConfig

        self.kernel = HammerKernel.TRITON
        self.num_heads, self.alpha = stack.form.num_heads, stack.alpha
        self.norm_length = stack.norm_length
        self.layers = []
        for weights in stack._weights():
            width = weights.norm_weight.numel()
            head_dim = weights.output_norm_weight.numel() // stack.form.num_heads
            layer = STULayer(
                STULayerConfig(
                    embedding_dim=width,
                    num_heads=stack.form.num_heads,
                    hidden_dim=head_dim,
                    attention_dim=head_dim,
                    output_dropout_ratio=0.0,
                )
            )
            layer._input_norm_weight = torch.nn.Parameter(weights.norm_weight.detach())
            layer._input_norm_bias = torch.nn.Parameter(weights.norm_bias.detach())
            layer._uvqk_weight = torch.nn.Parameter(weights.projection_weight.detach())
            layer._uvqk_beta = torch.nn.Parameter(weights.projection_bias.detach())
            layer._output_norm_weight = torch.nn.Parameter(weights.output_norm_weight.detach())
            layer._output_norm_bias = torch.nn.Parameter(weights.output_norm_bias.detach())
            layer._output_weight = torch.nn.Parameter(weights.output_weight.detach())
            layer.set_hammer_kernel(self.kernel)
            self.layers.append(layer)

    def parameters(self) -> list[Tensor]:
        return [p for layer in self.layers for p in layer.parameters()]

    def dense(self, x: Tensor, offsets: Tensor, *, max_length: int, num_targets: Tensor) -> Tensor:
        """`[T, D]` to `[T, D]`; divides by `max_length`, as the host does."""
        from generative_recommenders.ops.triton import triton_hstu_preprocess_and_attention

        triton_hstu_preprocess_and_attention._should_enable_tma = lambda: self.descriptors
        for layer in self.layers:
            x = layer(
                x=x,
                x_lengths=offsets.diff(),
                x_offsets=offsets,
                max_seq_len=max_length,
                num_targets=num_targets,
            )
        return x

    def weighted(
        self, x: Tensor, column_weights: Tensor, offsets: Tensor, *, max_length: int
    ) -> Tensor:
        """PGSA without a kernel of its own: the rows of V scaled between the host's operators."""
        from generative_recommenders.ops.hstu_attention import hstu_mha
        from generative_recommenders.ops.hstu_compute import (
            hstu_compute_output,
            hstu_compute_uqvk,
        )

        # The host divides by the length it is told; ours is that of the full sequence.
        scale = (column_weights * (max_length / self.norm_length)).to(x.dtype)[:, None, None]
        for layer in self.layers:
            u, q, k, v = hstu_compute_uqvk(
                x=x,
                norm_weight=layer._input_norm_weight,
                norm_bias=layer._input_norm_bias,
                norm_eps=1e-6,
                num_heads=self.num_heads,
                attn_dim=layer._attention_dim,
                hidden_dim=layer._hidden_dim,
                uvqk_weight=layer._uvqk_weight,
                uvqk_bias=layer._uvqk_beta,
                kernel=self.kernel,
            )
            attended = hstu_mha(
                max_seq_len=max_length,
                alpha=self.alpha,
                q=q,
                k=k,
                v=v * scale,
                seq_offsets=offsets,
                sort_by_length=True,
                kernel=self.kernel,
            )
            x = hstu_compute_output(
                attn=attended.view(len(x), -1),
                u=u,
                x=x,
                norm_weight=layer._output_norm_weight,
                norm_bias=layer._output_norm_bias,
                norm_eps=1e-6,
                dropout_ratio=0.0,
                output_weight=layer._output_weight,
                group_norm=False,
                num_heads=self.num_heads,
                linear_dim=layer._hidden_dim,
                concat_u=True,
                concat_x=True,
                mul_u_activation_type="none",
                training=True,
                kernel=self.kernel,
                recompute_y_in_backward=False,
            )
        return x


def autotuners() -> Iterator[tuple[str, Any]]:
    """The host's autotuned kernels, by name."""
    from triton.runtime.autotuner import Autotuner

    for module_name, module in sorted(sys.modules.items()):
        if module_name.startswith(_PACKAGE):
            for name, value in vars(module).items():
                if isinstance(value, Autotuner):
                    yield f"{module_name}.{name}", value


def prepare_tuning(journal: Path | None = None) -> None:
    """Tune for every length by itself, and time each configuration for 5 ms instead of 100.

    Args:
        journal: gets a line for every configuration before it runs, so that the last line of a
            process that died names the one at fault. Lines that start with "faulty" name
            configurations to leave out, lines that start with "best" the only ones to try.
    """
    from generative_recommenders.common import set_use_runtime_max_seq_len

    set_use_runtime_max_seq_len(True)
    marks = set(_lines(journal))
    for name, tuner in autotuners():
        tuner._do_bench = _time_shortly
        if journal is not None:
            kept = [c for c in tuner.configs if f"faulty {name}: {c}" not in marks]
            best = [c for c in kept if f"best {name}: {c}" in marks]
            tuner.configs = best or kept or tuner.configs
            tuner._bench = functools.partial(_noted, tuner._bench, name, journal)


def _noted(
    bench: Callable[..., Any], name: str, journal: Path, *args: Any, config: Any, **meta: Any
) -> Any:
    torch.cuda.synchronize()  # what went wrong before is not this configuration's fault
    with journal.open("a") as lines:
        lines.write(f"{name}: {config}\n")
    return bench(*args, config=config, **meta)


def leave_out_last(journal: Path) -> str | None:
    """Mark the configuration that ran when a process died; None if nothing was being tuned."""
    marked = [line for line in _lines(journal) if line.startswith(("faulty ", "best "))]
    tried = [line for line in _lines(journal) if line not in marked]
    if not tried:
        return None
    journal.write_text("\n".join([*marked, f"faulty {tried[-1]}"]) + "\n")
    return tried[-1]


def _lines(journal: Path | None) -> list[str]:
    return journal.read_text().splitlines() if journal is not None and journal.exists() else []


def keep_best(count: int, journal: Path) -> None:
    """From now on every kernel is tuned among the fastest of its last tuning only, here and in
    processes that read the journal."""
    with journal.open("a") as lines:
        for name, tuner in autotuners():
            timings = getattr(tuner, "configs_timings", None)
            if timings:
                tuner.configs = sorted(timings, key=timings.__getitem__)[:count]
                lines.writelines(f"best {name}: {config}\n" for config in tuner.configs)


def forget_attention(keep: int | None = None) -> None:
    """Let the attention kernels be tuned again, among their best so far or among all.

    At a million tokens the slow half of the configurations takes longer than the benchmark: it is
    tuned at a smaller batch of the same length first, and there among the best of those.
    """
    for name, tuner in autotuners():
        if "attn" not in name or not tuner.configs:
            continue
        every = _ALL_CONFIGURATIONS.setdefault(name, tuner.configs)
        timings = getattr(tuner, "configs_timings", None)
        tuner.configs, tuner.cache = every, {}
        if keep is not None and timings:
            tuner.configs = sorted(timings, key=timings.__getitem__)[:keep]


def compile_in_parallel(processes: int, forms: Sequence[str]) -> None:
    """Fill the compiler's cache with all configurations: one by one it takes minutes.

    Args:
        forms: of "dense", "described" (dense, by tensor descriptors) and "weighted".
    """
    command = [sys.executable, "-m", "examples.benchmarks.host", ",".join(forms)]
    workers = [
        subprocess.Popen(
            [*command, str(share), str(processes)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for share in range(processes)
    ]
    for worker in workers:
        worker.wait()


def _compile_share(forms: Sequence[str], share: int, of: int) -> None:
    stack = HSTUStack(
        embedding_dim=512, num_layers=1, num_heads=4, head_dim=128, norm_length=1024
    ).to("cuda", torch.bfloat16)
    host, described = HostStack(stack), HostStack(stack, descriptors=True)
    prepare_tuning()
    for _, tuner in autotuners():
        tuner.configs = tuner.configs[share % max(1, len(tuner.configs)) :: of]
    # Numbers divisible by 16 compile to kernels of their own: 16 sequences, and 8.
    for count in (16, 8):
        rows = count * 1024
        x = torch.randn(rows, 512, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        offsets = torch.arange(0, rows + 1, 1024, device="cuda")
        ones = torch.ones(rows, device="cuda")
        form = {"max_length": 1024, "num_targets": torch.ones_like(offsets[1:])}
        if "dense" in forms:
            host.dense(x, offsets, **form).sum().backward()
        if "described" in forms:
            described.dense(x, offsets, **form).sum().backward()
        if "weighted" in forms:
            host.weighted(x, ones, offsets, max_length=1024).sum().backward()
    torch.cuda.synchronize()


def _time_shortly(call: Callable[[], object], quantiles: object) -> list[float]:
    call()
    return [time_ms(call, budget_ms=5.0, most=9)] * 3


def provide_torchrec_module() -> None:
    """Provide a module that the host imports and torchrec before 1.9 lacks."""
    name = "torchrec.modules.sorted_index_select"
    if name in sys.modules:
        return
    try:
        importlib.import_module(name)
    except ImportError:
        module = types.ModuleType(name)

        def maybe_sorted_index_select(embeddings: Tensor, index: Tensor, use: bool) -> Tensor:
            return embeddings.index_select(0, index)

        module.maybe_sorted_index_select = maybe_sorted_index_select  # type: ignore[attr-defined]
        sys.modules[name] = module


if __name__ == "__main__":
    _compile_share(sys.argv[1].split(","), int(sys.argv[2]), int(sys.argv[3]))
