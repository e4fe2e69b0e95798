"""Work that would be empty is an error before training, and names the binding that caused it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from hpgr_plugin.data.events import DataError
from hpgr_plugin.data.log import SPLITS, TRAIN, PreparedData
from hpgr_plugin.data.requests import RequestSettings, build_requests
from hpgr_plugin.data.sequences import SequenceLoader


def check_splits(
    prepared: PreparedData, settings: RequestSettings, splits: Sequence[str] = SPLITS
) -> None:
    """Every split has requests, and validation and test have candidates of both labels.

    Further tasks need both labels in training as well.

    Args:
        prepared: what prepare_data returned.
        settings: of the requests.
        splits: those that are needed.

    Raises:
        DataError: one is empty or has a single label, where AUC is undefined.
    """
    if not prepared.is_candidate.any():
        raise DataError("no event is a candidate; see the reader's binding for `candidate`")
    for split in splits:
        in_split = prepared.is_candidate & (prepared.split == SPLITS.index(split))
        if not in_split.any():
            raise DataError(f"no candidate in the {split} split: {_split_binding(prepared, split)}")
        requests = build_requests(prepared, split, settings)
        if not len(requests):
            name = _emptying_setting(prepared, split, settings)
            binding = f"hpgr.RequestSettings.{name} = {getattr(settings, name)}"
            raise DataError(f"{binding} leaves out every request of the {split} split")
        rows = requests.all_candidate_rows()
        labels = np.unique(prepared.log.label[rows])
        if split != SPLITS[TRAIN] and len(labels) == 1:
            raise DataError(
                f"every candidate of the {split} split has the label {labels[0]}, so AUC is "
                f"undefined: {_label_binding(prepared)}; {_split_binding(prepared, split)}"
            )
        _check_tasks(prepared, split, rows)


def _check_tasks(prepared: PreparedData, split: str, rows: np.ndarray) -> None:
    """Both labels of every further task are among these rows of a split."""
    for task, labels in prepared.log.task_labels.items():
        found = np.unique(labels[rows])
        if len(found) == 1:
            raise DataError(
                f"every candidate of the {split} split has the label {found[0]} of the task "
                f"{task!r}: see hpgr.prepare_data.tasks[{task!r}]; "
                f"{_split_binding(prepared, split)}"
            )


def check_sequences(loader: SequenceLoader) -> None:
    """There is a sequence to pre-train on.

    Raises:
        DataError: there is none.
    """
    if loader.num_sequences:
        return
    prepared = loader.prepared
    history = int((prepared.is_history & (prepared.split == TRAIN)).sum())
    raise DataError(
        f"no training sequence among {history} history events of the train split: "
        f"hpgr.SequenceLoader.min_length = {loader.min_length}, "
        f"only_positive = {loader.only_positive}; "
        f"hpgr.prepare_data.history_events = {prepared.settings['history_events']!r}; "
        f"{_split_binding(prepared, SPLITS[TRAIN])}"
    )


def _split_binding(prepared: PreparedData, split: str) -> str:
    """The bindings that size the split, with their values."""
    rule = prepared.settings["split"]
    names = [split] if split in rule else [name for name in rule if name != "name"]
    return ", ".join(f"hpgr.{rule['name']}.{name} = {rule[name]}" for name in names)


def _label_binding(prepared: PreparedData) -> str:
    """The binding that makes the labels, with its value."""
    rule = prepared.settings["label"]
    if rule["binary"]:
        return f"hpgr.label_column.field = {rule['field']!r}"
    return f"hpgr.rating_at_least.threshold = {rule['threshold']} on {rule['field']!r}"


def _emptying_setting(prepared: PreparedData, split: str, settings: RequestSettings) -> str:
    """The setting that leaves no request."""
    if split != SPLITS[TRAIN]:
        return "min_history_in_evaluation"
    every = build_requests(prepared, split, replace(settings, train_fraction=1.0))
    return "train_fraction" if len(every) else "min_history"
