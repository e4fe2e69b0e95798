"""Serving: a folder with a trained ranker, a scorer with kept histories, and an HTTP server."""

from hpgr_plugin.serving.folder import FolderError
from hpgr_plugin.serving.requests import HistoryNotKeptError, Request
from hpgr_plugin.serving.scorer import Scorer, Scores
from hpgr_plugin.serving.vocabulary import RequestError

__all__ = ["FolderError", "HistoryNotKeptError", "Request", "RequestError", "Scorer", "Scores"]
