"""Requests as a client sends them."""

from typing import Any

import numpy as np

from hpgr_plugin.data.log import PreparedData, concatenated_ranges
from hpgr_plugin.data.requests import build_requests
from hpgr_plugin.serving.requests import Request


def requests_of(data: PreparedData, settings: Any, split: str = "test") -> list[Request]:
    """The requests of a split as a client sends them: whole histories, in the log's own ids."""
    log, requests = data.log, build_requests(data, split, settings)
    made = []
    for place in range(len(requests)):
        one = requests.take(np.array([place]))
        start, end = data.history_offsets[one.users[0]], data.history_offsets[one.users[0] + 1]
        history = data.history_rows[start:end]
        rows = one.candidate_rows[concatenated_ranges(one.candidate_start, one.candidate_count)]
        made.append(
            Request(
                history_items=log.item_ids[log.item[history]].tolist(),
                history_times=log.timestamp[history].tolist(),
                history_actions=log.action_values[log.action[history]].tolist(),
                candidates=log.item_ids[log.item[rows]].tolist(),
                times=log.timestamp[rows].tolist(),
                user_id=log.user_ids[one.users[0]].item(),
            )
        )
    return made
