"""GAUC over impressions instead of users."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from hpgr_plugin import metrics
from hpgr_plugin.data import (
    LastFractionSplit,
    PreparedData,
    RequestSettings,
    SyntheticReader,
    item_mean_scores,
    label_column,
    prepare_data,
)
from hpgr_plugin.errors import HpgrError
from hpgr_plugin.hosts.embedded.report.evaluation import Task
from hpgr_plugin.hosts.embedded.train.distributed import Process

ONE_PROCESS = Process(rank=0, world_size=1, device=torch.device("cpu"))


def data(*, groups: bool) -> PreparedData:
    prepared = prepare_data(
        reader=SyntheticReader(num_users=40),
        label=label_column(field="is_click"),
        split=LastFractionSplit(test=0.5),
        cache_dir=None,
    )
    if not groups:
        return prepared
    # Impressions of four events; users share the numbers of theirs.
    events = (
        np.arange(prepared.log.num_events)
        - prepared.log.user_offsets[:-1][prepared.log.event_users()]
    )
    return replace(prepared, log=replace(prepared.log, group=events // 4))


def test_gauc_is_the_mean_over_impressions() -> None:
    prepared = data(groups=True)
    task = Task(prepared, RequestSettings(), ONE_PROCESS, gauc_by="impression")
    scored = item_mean_scores(prepared, "test", RequestSettings())
    assert prepared.log.group is not None
    impression = scored.users * 1000 + prepared.log.group[scored.rows]
    found = task.metrics(scored)
    assert found["gauc"] == metrics.gauc(scored.labels, scored.scores, impression)
    assert found["gauc"] != metrics.gauc(scored.labels, scored.scores, scored.users)
    assert found["auc"] == metrics.auc(scored.labels, scored.scores)


def test_a_log_without_impressions_is_refused() -> None:
    with pytest.raises(HpgrError, match=r"hpgr\.run\.gauc_by takes 'user'"):
        Task(data(groups=False), RequestSettings(), ONE_PROCESS, gauc_by="impression")
