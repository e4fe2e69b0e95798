"""What the server counts, for Prometheus. Needs the extra `serve`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from hpgr_plugin.serving.history_cache import HistoryCache

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Counters of one server.

    Args:
        cache: of the scorer.
    """

    def __init__(self, cache: HistoryCache) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "hpgr_requests", "Requests of /score by status", ["status"], registry=self.registry
        )
        self._seconds = Histogram(
            "hpgr_request_seconds", "Time of a request", buckets=_SECONDS, registry=self.registry
        )
        self._batch_size = Histogram(
            "hpgr_batch_requests", "Requests in a batch", buckets=_SIZES, registry=self.registry
        )
        self._batch_seconds = Histogram(
            "hpgr_batch_seconds", "Time to score a batch", buckets=_SECONDS, registry=self.registry
        )
        self.candidates = self._counter("hpgr_candidates", "Candidates of answered requests")
        self.unknown_candidates = self._counter(
            "hpgr_unknown_candidates", "Candidates that the model does not have"
        )
        self.unknown_history = self._counter(
            "hpgr_unknown_history_items", "History items that the model does not have"
        )
        self.registry.register(_CacheCollector(cache))

    def request(self, status: int, seconds: float) -> None:
        """Count one answer."""
        self._requests.labels(str(status)).inc()
        self._seconds.observe(seconds)

    def batch(self, size: int, seconds: float) -> None:
        """Count one batch."""
        self._batch_size.observe(size)
        self._batch_seconds.observe(seconds)

    def watch_queue(self, num_waiting: Callable[[], int]) -> None:
        """Show how many requests wait."""
        gauge = Gauge("hpgr_waiting_requests", "Requests in no batch yet", registry=self.registry)
        gauge.set_function(lambda: float(num_waiting()))

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, registry=self.registry)


class _CacheCollector:
    """The cache's own counts, read when they are asked for."""

    def __init__(self, cache: HistoryCache) -> None:
        self._cache = cache

    def collect(self) -> Iterator[Metric]:
        """For the registry."""
        counts = CounterMetricFamily(
            "hpgr_history_cache", "Histories by how they were found", labels=["outcome"]
        )
        for outcome, count in vars(self._cache.counts).items():
            counts.add_metric([outcome], count)
        yield counts
        yield GaugeMetricFamily(
            "hpgr_history_cache_bytes", "Memory of kept histories", value=self._cache.num_bytes
        )
        yield GaugeMetricFamily(
            "hpgr_history_cache_users", "Kept histories", value=len(self._cache)
        )
