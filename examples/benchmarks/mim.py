"""The softmax over all items against its three matrix products."""

import torch

from examples.benchmarks.registry import check, measure_ceilings, print_table, time_ms
from hpgr_plugin.ops.item_softmax import mean_cross_entropy


def run(*, quick: bool) -> None:
    measure_ceilings()
    rows = []
    for masked, items, width in ((8192, 50_000, 512), (26214, 100_000, 128))[: 1 if quick else 2]:
        hidden = torch.randn(masked, width, device="cuda").bfloat16().requires_grad_()
        table = (0.1 * torch.randn(items, width, device="cuda")).bfloat16().requires_grad_()
        targets = torch.randint(0, items, (masked,), device="cuda")
        _check(hidden, table, targets)

        def loss(h=hidden, w=table, t=targets) -> object:  # type: ignore[no-untyped-def]
            return torch.autograd.grad(mean_cross_entropy(h, w, t).loss, (h, w))

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


def _check(hidden: torch.Tensor, table: torch.Tensor, targets: torch.Tensor) -> None:
    """Loss and gradients of some positions against the whole softmax in float32."""
    few = slice(0, 64)
    got = mean_cross_entropy(hidden[few], table, targets[few]).loss
    exact = [x.detach().float().requires_grad_() for x in (hidden[few], table)]
    wanted = torch.nn.functional.cross_entropy(exact[0] @ exact[1].t(), targets[few])
    check("softmax", got, wanted, 1e-2)
    for got_grad, wanted_grad in zip(
        torch.autograd.grad(got, (hidden, table)), torch.autograd.grad(wanted, exact), strict=True
    ):
        check("its gradient", got_grad[: len(wanted_grad)], wanted_grad, 2e-2)
