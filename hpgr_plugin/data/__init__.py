"""Data: logs on disk -> user sequences -> batches.

reader -> EventTable -> build_log -> InteractionLog -> split -> PreparedData (cached) -> requests
-> batches. Every part is a gin configurable of module `hpgr`; `import hpgr_plugin.data` in a gin
file makes them known. Needs pandas and pyarrow (extra `data`).
"""

from hpgr_plugin.data.batch import Batch, SequenceBatch
from hpgr_plugin.data.batches import RequestLoader
from hpgr_plugin.data.errors import DataError
from hpgr_plugin.data.labels import LabelRule, label_column, rating_at_least
from hpgr_plugin.data.log import CategoricalFeature, InteractionLog
from hpgr_plugin.data.prepare import prepare_data
from hpgr_plugin.data.prepared import PreparedData
from hpgr_plugin.data.readers.movielens import MovieLensReader
from hpgr_plugin.data.requests import Requests, RequestSettings, build_requests
from hpgr_plugin.data.sequences import SequenceLoader
from hpgr_plugin.data.split import GlobalTimeSplit, LastFractionSplit, LastNSplit

__all__ = [
    "Batch",
    "CategoricalFeature",
    "DataError",
    "GlobalTimeSplit",
    "InteractionLog",
    "LabelRule",
    "LastFractionSplit",
    "LastNSplit",
    "MovieLensReader",
    "PreparedData",
    "RequestLoader",
    "RequestSettings",
    "Requests",
    "SequenceBatch",
    "SequenceLoader",
    "build_requests",
    "label_column",
    "prepare_data",
    "rating_at_least",
]
