"""SEM forward and backward against the dense step over the same tokens."""

import torch

from examples.benchmarks import host
from examples.benchmarks.registry import measure_ceilings, print_table
from examples.benchmarks.stack import WIDTH, Batch, new_stack, step_times
from hpgr_plugin.sem import SessionEnhancementModule

TOKENS = 131072


def run(*, quick: bool) -> None:
    measure_ceilings()
    rows = []
    for length in (4096,) if quick else (1024, 4096, 16384):
        batch, stack = Batch(TOKENS, length), new_stack(length)
        whole = batch.whole()
        inputs = [whole, *stack.parameters()]
        last = batch.offsets[1:] - 1
        if host.is_there():
            host.stand_in()
            dense_host = host.HostStack(stack)
            host.prepare_tuning()
            host.forget_attention()
            dense = step_times(
                lambda b=batch, d=dense_host, x=whole, rows=last: d.dense(
                    x, b.offsets, max_length=b.length, num_targets=b.num_targets
                )[rows],
                [whole, *dense_host.parameters()], batch.grad,
            )  # fmt: skip
        else:
            dense = step_times(
                lambda b=batch, s=stack, x=whole, rows=last: s.all_rows(
                    x, b.offsets, max_length=b.length
                )[rows],
                inputs, batch.grad,
            )  # fmt: skip
        for session in (5, 20, 100):
            # A session ends after each event with probability 1 / session.
            gaps = torch.where(torch.rand(len(whole), device="cuda") < 1 / session, 7200, 60)
            times = gaps.cumsum(0)
            module = SessionEnhancementModule(embedding_dim=WIDTH, num_heads=4).cuda().bfloat16()
            sem = step_times(
                lambda m=module, x=whole, o=batch.offsets, t=times: m(x, o, t),
                [whole, *module.parameters()], torch.randn_like(whole),
            )  # fmt: skip
            rows.append(
                {
                    "n": length, "events a session": session, "SEM f+b ms": sem[1],
                    "dense f+b ms": dense[1], "SEM / dense": sem[1] / dense[1], "GiB": sem[2],
                }
            )  # fmt: skip
    print_table(rows)
