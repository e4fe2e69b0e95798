"""The tables of a finished slate ablation, from its results.json and the slates on disk."""

from __future__ import annotations

from pathlib import Path

from hpgr_plugin.files import atomic_write
from hpgr_plugin.hosts.embedded.slates.table import slate_tables
from hpgr_plugin.report.finished import results_of


def slates(folder: Path, out: Path) -> list[Path]:
    """Tokenizers and slates by model: `slates.md`, and `slates.csv` with every seed.

    Args:
        folder: `hpgr.run.output_dir` of a finished slate ablation.
        out: where the files go.

    Raises:
        HpgrError: the folder holds none.
    """
    with results_of(folder, "slate ablation") as (_, content):
        metrics, environment = content["metrics"], content["environment"]
        rows, tokenizers = metrics["rows"], metrics["tokenizers"]
        text = slate_tables(rows, tokenizers, metrics["best_rival"])
        command, device = environment["command"], environment["device"]
    lines = [f"# {command}; {device}; seeds {content['seeds']}", "kind,scope,seed,metric,value"]
    measured = [("tokenizer", scope, seeds) for scope, seeds in tokenizers.items()]
    measured += [("slates", row["scope"], row["seeds"]) for row in rows]
    for kind, scope, seeds in measured:
        for seed, values in zip(content["seeds"], seeds, strict=False):
            lines += [
                f"{kind},{scope},{seed},{name},{value}"
                for name, value in values.items()
                if isinstance(value, int | float)
            ]
    example = metrics.get("example") or ""
    written = {
        "slates.md": "\n\n".join([text, f"`{command}`, {device}.", example]).rstrip() + "\n",
        "slates.csv": "\n".join(lines) + "\n",
        "slates.gin": content["operative_config"],
    }
    for name, body in written.items():
        with atomic_write(out / name) as file:
            file.write_text(body)
    print(text)
    return [out / name for name in written]
