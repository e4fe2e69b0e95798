"""Empty work is an error that names the binding; work that is there passes."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from hpgr_plugin.data import (
    DataError,
    GlobalTimeSplit,
    LastFractionSplit,
    LastNSplit,
    PreparedData,
    RequestSettings,
    SequenceLoader,
    SyntheticReader,
    check_sequences,
    check_splits,
    label_column,
    prepare_data,
    rating_at_least,
)


def prepared(**changes: Any) -> PreparedData:
    arguments: dict[str, Any] = {
        "reader": SyntheticReader(num_users=20),
        "label": label_column("is_click"),
        "split": LastFractionSplit(),
        "cache_dir": None,
    }
    return prepare_data(**arguments | changes)


def test_work_that_is_there_passes() -> None:
    check_splits(prepared(), RequestSettings())
    check_splits(prepared(split=LastNSplit(test=2, validation=0)), RequestSettings(), ["test"])
    check_sequences(SequenceLoader(prepared=prepared()))


@pytest.mark.parametrize(
    ("changes", "binding"),
    [
        ({"split": LastFractionSplit(test=0)}, "hpgr.LastFractionSplit.test = 0"),
        ({"split": LastNSplit(validation=0)}, "hpgr.LastNSplit.validation = 0"),
        ({"split": GlobalTimeSplit(test=0.0)}, "hpgr.GlobalTimeSplit.test = 0.0"),
        ({"split": LastNSplit(test=1000)}, "hpgr.LastNSplit.test = 1000, hpgr.LastNSplit.valid"),
        ({"label": rating_at_least(9.0, "is_click")}, "hpgr.rating_at_least.threshold = 9.0"),
        ({"label": rating_at_least(0.0, "is_click")}, "hpgr.rating_at_least.threshold = 0.0"),
    ],
)
def test_the_binding_of_the_data_is_named(changes: dict[str, Any], binding: str) -> None:
    with pytest.raises(DataError, match=binding.replace(".", r"\.")):
        check_splits(prepared(**changes), RequestSettings())


@pytest.mark.parametrize(
    ("setting", "value"),
    [("min_history", 10**4), ("min_history_in_evaluation", 10**4), ("train_fraction", 1e-9)],
)
def test_the_binding_of_the_requests_is_named(setting: str, value: float) -> None:
    with pytest.raises(DataError, match=rf"hpgr\.RequestSettings\.{setting} = {value}"):
        check_splits(prepared(), RequestSettings(**{setting: value}))


def test_no_candidate_at_all() -> None:
    data = prepared()
    data = dataclasses.replace(data, is_candidate=np.zeros_like(data.is_candidate))
    with pytest.raises(DataError, match="`candidate`"):
        check_splits(data, RequestSettings())


def test_no_training_sequence() -> None:
    with pytest.raises(DataError, match=r"hpgr\.SequenceLoader\.min_length = 1000"):
        check_sequences(SequenceLoader(prepared=prepared(), min_length=1000))


def test_no_positive_event_to_pre_train_on() -> None:
    data = prepared()
    data = dataclasses.replace(
        data, log=dataclasses.replace(data.log, label=np.zeros_like(data.log.label))
    )
    with pytest.raises(DataError, match="only_positive = True"):
        check_sequences(SequenceLoader(prepared=data, only_positive=True))
