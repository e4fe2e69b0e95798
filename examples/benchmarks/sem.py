"""SEM forward and backward: its own time against the dense step, and what it adds to our step."""

import itertools
from functools import partial

import torch
from torch import Tensor

from examples.benchmarks import host
from examples.benchmarks.registry import measure_ceilings, print_table
from examples.benchmarks.stack import WIDTH, Batch, host_times, new_stack, step_times
from hpgr_plugin.components.hstu_stack import HSTUStack
from hpgr_plugin.components.sem import SessionEnhancementModule


def run(*, quick: bool) -> None:
    measure_ceilings()
    rows = []
    lengths = (4096,) if quick else (1024, 4096, 16384)
    for length, tokens in itertools.product(lengths, (131072, 1048576)):
        batch, stack = Batch(tokens, length), new_stack(length)
        whole = batch.whole()
        ours = _dense_ms(stack, batch, whole)
        theirs = _host_ms(stack, batch, whole) if host.is_there() else float("nan")
        for session in (5, 20, 100):
            # A session ends after each event with probability 1 / session.
            gaps = torch.where(torch.rand(len(whole), device="cuda") < 1 / session, 7200, 60)
            times = gaps.cumsum(0)
            module = SessionEnhancementModule(embedding_dim=WIDTH, num_heads=4).cuda().bfloat16()
            enhance = partial(module, whole, batch.offsets, times)
            inputs = [whole, *module.parameters()]
            own = step_times(enhance, inputs, torch.randn_like(whole))
            step = _dense_ms(stack, batch, whole, enhance)
            rows.append(
                {
                    "tokens": tokens, "n": length, "events per session": session,
                    "SEM f+b ms": own[1], "GiB": own[2], "dense host f+b ms": theirs,
                    "SEM / host": own[1] / theirs, "dense ours f+b ms": ours,
                    "with SEM": step, "adds / host": (step - ours) / theirs,
                }
            )  # fmt: skip
    print_table(rows)


def _dense_ms(
    stack: HSTUStack, batch: Batch, whole: Tensor, enhance: partial[Tensor] | None = None
) -> float:
    """Forward and backward of our dense stack, with SEM in front if `enhance` calls one."""
    last = batch.offsets[1:] - 1

    def forward() -> Tensor:
        x = whole if enhance is None else enhance()
        return stack.all_rows(x, batch.offsets, max_length=batch.length)[last]

    parameters = [] if enhance is None else enhance.func.parameters()
    return step_times(forward, [whole, *stack.parameters(), *parameters], batch.grad)[1]


def _host_ms(stack: HSTUStack, batch: Batch, whole: Tensor) -> float:
    host.provide_torchrec_module()
    dense = host.HostStack(stack)
    host.prepare_tuning()
    # Tuned at the smaller batch; the larger chooses among the best of those.
    host.forget_attention(keep=3 if len(whole) > 2**17 else None)
    return host_times(dense, batch, whole)[1]
