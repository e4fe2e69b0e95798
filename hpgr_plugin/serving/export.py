"""Write the folder that is served from a training's checkpoint.

python -m hpgr_plugin.serving.export --gin_config_file=RUN.gin --out=FOLDER [--row=SCOPE]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch

from hpgr_plugin.cli import USER_ERRORS, load_configs
from hpgr_plugin.config.registry import ConfigError, build
from hpgr_plugin.config.scopes import config_scope
from hpgr_plugin.config.stored import bound_value, recorded_config
from hpgr_plugin.errors import one_line
from hpgr_plugin.hosts.embedded.report.evaluation import Task
from hpgr_plugin.hosts.embedded.train.checkpoint import load_checkpoint, load_weights
from hpgr_plugin.hosts.embedded.train.distributed import Process
from hpgr_plugin.hosts.embedded.train.run_directory import CHECKPOINT
from hpgr_plugin.hosts.embedded.train.stages import arguments_from_data
from hpgr_plugin.serving.folder import write_folder
from hpgr_plugin.serving.vocabulary import Vocabulary
from hpgr_plugin.version import __version__


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and export."""
    parser = argparse.ArgumentParser(prog="python -m hpgr_plugin.serving.export")
    parser.add_argument("--gin_config_file", required=True, help="of the training")
    parser.add_argument("--gin_bindings", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--out", required=True, type=Path, help="folder that is written")
    parser.add_argument("--row", default="", help="row (gin scope) of an ablation")
    parser.add_argument("--seed", type=int, default=None, help="of that row; default: the first")
    options = parser.parse_args(arguments)
    try:
        load_configs([options.gin_config_file], options.gin_bindings)
        checkpoint = export_configured(options.out, row=options.row, seed=options.seed)
    except USER_ERRORS as error:
        print("error:", one_line(error), file=sys.stderr)
        sys.exit(2)
    print(f"wrote {options.out}, the model of {checkpoint}")


def export_configured(out: Path, *, row: str = "", seed: int | None = None) -> Path:
    """Export the trained model of the parsed configuration; return its checkpoint.

    Args:
        out: folder that is written.
        row: gin scope of an ablation's row; "" for a run of one model.
        seed: of the row; None: the first of `hpgr.run.seeds`.

    Raises:
        ConfigError: no such row.
        CheckpointError: no checkpoint, or one of another model.
    """
    directory = Path(bound_value("hpgr.run.output_dir", "results"))
    rows = bound_value("hpgr.run.rows", [])
    if row:
        if row not in rows:
            raise ConfigError(f"--row takes one of {sorted(rows)}, got {row!r}")
        first = bound_value("hpgr.run.seeds", [0])[0]
        directory = directory / f"{row}_seed{first if seed is None else seed}"
    elif bound_value("hpgr.run.mode", "") == "ablation":
        raise ConfigError(f"the run is an ablation: --row takes one of {sorted(rows)}")
    with config_scope(row) if row else nullcontext():
        task = Task(
            build("prepare_data"), build("RequestSettings"), Process(0, 1, torch.device("cpu"))
        )
        export_checkpoint(directory / CHECKPOINT, out, task, scope=row)
    return directory / CHECKPOINT


def export_checkpoint(checkpoint: Path, out: Path, task: Task, *, scope: str = "") -> None:
    """Export the best weights of a checkpoint; the active configuration is that of its model.

    Args:
        checkpoint: of stage 2.
        out: folder that is written.
        task: data and requests.
        scope: the active gin scope, "" for none.

    Raises:
        CheckpointError: no checkpoint, or one of another model.
    """
    state = load_checkpoint(checkpoint, torch.device("cpu"))
    arguments = arguments_from_data(task.data)
    with recorded_config() as config:
        build("RequestSettings")
        # Without the hand-over: the weights come from the checkpoint.
        model = build("HSTURanker", **arguments, pretrained=None)
    if model.reads_statistics:
        raise ConfigError(
            "hpgr.HSTURanker.statistics must be None in a served model: the folder holds no "
            "counts of items and users up to the time of a request"
        )
    task.decide_causal(model.sem)
    load_weights(checkpoint, model, state["best_model"])
    write_folder(
        out,
        model=model.eval(),
        config=config[0],
        scope=scope,
        arguments=arguments,
        vocabulary=Vocabulary.of(task.data.log),
        notes={
            "hpgr_plugin": __version__,
            "data_digest": task.data.digest(),
            "item_vocabulary_digest": task.data.log.item_vocabulary_digest,
            "trained_steps": state["progress"]["step"],
        },
    )


if __name__ == "__main__":
    main()
