"""What the server counts, for Prometheus. Needs the extra `serve`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from hpgr_plugin.serving.captured import CapturedCandidates
from hpgr_plugin.serving.history_cache import HistoryCache
from hpgr_plugin.serving.scorer import Scorer

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class RouteMetrics:
    """Counters of one route.

    Args:
        registry: that they are added to.
        route: such as "/score".
        prefix: of the names.
    """

    def __init__(self, registry: CollectorRegistry, route: str, prefix: str) -> None:
        self._requests = Counter(
            f"{prefix}_requests", f"Requests of {route} by status", ["status"], registry=registry
        )
        self._seconds = Histogram(
            f"{prefix}_request_seconds", "Time of a request", buckets=_SECONDS, registry=registry
        )
        self._batch_size = Histogram(
            f"{prefix}_batch_requests", "Requests in a batch", buckets=_SIZES, registry=registry
        )
        self._batch_seconds = Histogram(
            f"{prefix}_batch_seconds", f"A batch of {route}", buckets=_SECONDS, registry=registry
        )
        self.unknown_history = Counter(
            f"{prefix}_unknown_history_items",
            "History items that the model does not have",
            registry=registry,
        )

    def request(self, status: int, seconds: float) -> None:
        """Count one answer."""
        self._requests.labels(str(status)).inc()
        self._seconds.observe(seconds)

    def batch(self, size: int, seconds: float) -> None:
        """Count one batch."""
        self._batch_size.observe(size)
        self._batch_seconds.observe(seconds)


class Metrics:
    """Counters of one server.

    Args:
        scorer: whose kept histories and CUDA graphs are counted.
        slates: whether the server answers /slate.
    """

    def __init__(self, scorer: Scorer, *, slates: bool = False) -> None:
        self.registry = CollectorRegistry()
        self.score = RouteMetrics(self.registry, "/score", "hpgr")
        self.routes = {"/score": self.score}
        if slates:
            self.routes["/slate"] = RouteMetrics(self.registry, "/slate", "hpgr_slate")
        self.candidates = self._counter("hpgr_candidates", "Candidates of answered requests")
        self.unknown_candidates = self._counter(
            "hpgr_unknown_candidates", "Candidates that the model does not have"
        )
        self.registry.register(_CacheCollector(scorer.cache))
        if scorer.captured is not None:
            self.registry.register(_GraphCollector(scorer.captured))

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


class _GraphCollector:
    """What the CUDA graphs count themselves."""

    def __init__(self, captured: CapturedCandidates) -> None:
        self._captured = captured

    def collect(self) -> Iterator[Metric]:
        """For the registry."""
        yield CounterMetricFamily(
            "hpgr_graph_requests", "Requests that a graph scored", value=self._captured.replayed
        )
        yield GaugeMetricFamily("hpgr_graphs", "Kept CUDA graphs", value=len(self._captured))
        yield GaugeMetricFamily(
            "hpgr_graph_bytes", "Memory of CUDA graphs", value=self._captured.num_bytes
        )
