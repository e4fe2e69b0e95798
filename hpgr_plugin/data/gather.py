"""Requests -> the tensors of a batch."""

from __future__ import annotations

import numpy as np
import torch

from hpgr_plugin.data.batch import Batch
from hpgr_plugin.data.prepared import PreparedData
from hpgr_plugin.data.ranges import concatenated_ranges, offsets_of
from hpgr_plugin.data.requests import Requests


def gather_batch(prepared: PreparedData, requests: Requests) -> Batch:
    """The batch of these requests, in their order."""
    log = prepared.log
    history = prepared.history_rows[
        concatenated_ranges(requests.history_start, requests.history_count)
    ]
    candidates = requests.all_candidate_rows()
    return Batch(
        history_items=tensor(log.item[history]),
        history_timestamps=tensor(log.timestamp[history]),
        history_actions=tensor(log.action[history]),
        history_offsets=tensor(offsets_of(requests.history_count)),
        candidate_items=tensor(log.item[candidates]),
        candidate_timestamps=tensor(log.timestamp[candidates]),
        candidate_labels=tensor(log.label[candidates], np.float32),
        candidate_offsets=tensor(offsets_of(requests.candidate_count)),
        users=tensor(requests.users),
        user_features={
            name: tensor(feature.codes[requests.users])
            for name, feature in log.user_features.items()
        },
    )


def tensor(values: np.ndarray, dtype: type = np.int64) -> torch.Tensor:
    """A tensor of its own, also where the values lie in a read-only file."""
    return torch.from_numpy(np.array(values, dtype=dtype))
