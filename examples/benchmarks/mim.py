"""The full softmax over all items against its own three matrix products."""

import torch

from examples.benchmarks.registry import check, measure_ceilings, print_table, time_ms
from hpgr_plugin.losses import chunked_cross_entropy


def run(*, quick: bool) -> None:
    measure_ceilings()
    rows = []
    for masked, items, width in ((8192, 50_000, 512), (26214, 100_000, 128))[: 1 if quick else 2]:
        hidden = torch.randn(masked, width, device="cuda").bfloat16().requires_grad_()
        table = (0.1 * torch.randn(items, width, device="cuda")).bfloat16().requires_grad_()
        targets = torch.randint(0, items, (masked,), device="cuda")
        with torch.no_grad():
            few = slice(0, 64)
            wanted = torch.nn.functional.cross_entropy(
                hidden[few].float() @ table.float().t(), targets[few], reduction="none"
            )
            got = chunked_cross_entropy(hidden[few], table, targets[few]).losses
        check("softmax", got, wanted, 1e-2)

        def loss(h=hidden, w=table, t=targets) -> object:  # type: ignore[no-untyped-def]
            return torch.autograd.grad(chunked_cross_entropy(h, w, t).losses.sum(), (h, w))

        scores = torch.empty(masked, items, device="cuda", dtype=torch.bfloat16).normal_()

        def products(h=hidden, w=table, s=scores) -> object:  # type: ignore[no-untyped-def]
            with torch.no_grad():
                return h @ w.t(), s @ w, s.t() @ h

        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        loss_ms = time_ms(loss)
        peak = (torch.cuda.max_memory_allocated() - base) / 2**30
        products_ms = time_ms(products)
        rows.append(
            {
                "masked": masked, "items": items, "D": width, "loss f+b ms": loss_ms,
                "three products ms": products_ms, "loss / products": loss_ms / products_ms,
                "GiB beside the inputs": peak,
                "one matrix of scores GiB": 2 * scores.numel() / 2**30,
            }
        )  # fmt: skip
        del scores
    print_table(rows)
