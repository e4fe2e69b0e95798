"""What a longer history costs: the same pairs and the same K while the history doubles."""

from examples.benchmarks.registry import measure_ceilings, print_table
from examples.benchmarks.stack import Batch, new_stack, pgsa_step, step_times

USERS = 128
SETTINGS = ((32, 2.0, 0), (8, 1.0, 32))


def run(*, quick: bool) -> None:
    measure_ceilings()
    rows: list[dict[str, object]] = []
    first: dict[tuple[int, float, int], float] = {}
    for length in (1024, 4096, 16384) if quick else (1024, 2048, 4096, 8192, 16384):
        stack, batch = new_stack(length), Batch(USERS * length, length)
        row: dict[str, object] = {"n": length, "pairs": USERS}
        for setting in SETTINGS:
            step, how = pgsa_step(stack, batch, setting)
            inputs = [batch.history, batch.candidates, *stack.parameters()]
            _, full, _ = step_times(step, inputs, batch.grad)
            name = "{} {:g} {}".format(*setting)
            row |= {
                f"{name} kept": int(batch.select(setting).offsets[-1]) // USERS,
                f"{name} f+b ms ({how})": full,
                f"{name} / first": full / first.setdefault(setting, full),
            }
        rows.append(row)
    print_table(rows)
