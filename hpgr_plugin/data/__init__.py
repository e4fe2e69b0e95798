"""Data: logs on disk -> user sequences -> batches.

reader -> EventTable -> build_log -> InteractionLog -> split -> PreparedData (cached) -> requests
-> batches. Needs pandas and pyarrow (extra `data`).
"""

from hpgr_plugin.data.baselines import item_mean_scores
from hpgr_plugin.data.batch import Batch, SequenceBatch
from hpgr_plugin.data.batches import RequestLoader
from hpgr_plugin.data.check_splits import check_sequences, check_splits
from hpgr_plugin.data.events import DataError
from hpgr_plugin.data.labels import LabelRule, label_column, rating_at_least
from hpgr_plugin.data.log import CategoricalFeature, InteractionLog, PreparedData
from hpgr_plugin.data.prepare import prepare_data
from hpgr_plugin.data.readers.ebnerd import EBNeRDReader
from hpgr_plugin.data.readers.kuairand import KuaiRandReader
from hpgr_plugin.data.readers.movielens import MovieLensReader
from hpgr_plugin.data.readers.table import TableReader
from hpgr_plugin.data.readers.yambda import YambdaReader
from hpgr_plugin.data.requests import Requests, RequestSettings, build_requests
from hpgr_plugin.data.sequences import SequenceLoader
from hpgr_plugin.data.split import GlobalTimeSplit, LastFractionSplit, LastNSplit
from hpgr_plugin.data.synthetic import SyntheticReader, SyntheticTruth

__all__ = [
    "Batch",
    "CategoricalFeature",
    "DataError",
    "EBNeRDReader",
    "GlobalTimeSplit",
    "InteractionLog",
    "KuaiRandReader",
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
    "SyntheticReader",
    "SyntheticTruth",
    "TableReader",
    "YambdaReader",
    "build_requests",
    "check_sequences",
    "check_splits",
    "item_mean_scores",
    "label_column",
    "prepare_data",
    "rating_at_least",
]
