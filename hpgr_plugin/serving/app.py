"""The HTTP server's routes: POST /score and /slate, GET /healthz and /metrics.

Needs the extra `serve`.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from fastapi import FastAPI, HTTPException, Response
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr

from hpgr_plugin.hosts.embedded.slates.generator import History
from hpgr_plugin.serving.batcher import Batcher, BatchLimits, OverloadedError, StoppingError
from hpgr_plugin.serving.metrics import Metrics
from hpgr_plugin.serving.requests import HistoryNotKeptError, Request
from hpgr_plugin.serving.scorer import Scorer, Scores
from hpgr_plugin.serving.slates import SlateAnswer, SlateServer
from hpgr_plugin.serving.vocabulary import RequestError

ItemId = StrictInt | StrictStr


class Strict(BaseModel):
    """A part of a request; a field that it does not have is an error."""

    model_config = ConfigDict(extra="forbid")


class ScoreHistory(Strict):
    """A user's history, oldest first."""

    items: list[ItemId] = Field(default_factory=list)
    times: list[StrictInt] = Field(default_factory=list)
    actions: list[StrictInt | StrictStr | float] | None = None


class ScoreRequest(Strict):
    """Candidates to score at `time` (seconds), or at `times` each, for one user's history.

    `history_version` of an earlier answer stands for a history that the server keeps. Without
    both, the history is empty.
    """

    candidates: list[ItemId]
    history: ScoreHistory | None = None
    history_version: StrictStr | None = None
    time: StrictInt | None = None
    times: list[StrictInt] | None = None
    user_id: ItemId | None = None
    user_features: dict[str, StrictInt | StrictStr | None] = Field(default_factory=dict)

    def as_request(self) -> Request:
        """For the scorer.

        Raises:
            RequestError: both or neither of `time` and `times`, or history and version both.
        """
        if (self.time is None) == (self.times is None):
            raise RequestError("time", "give either time, for all candidates, or times, one each")
        history = self.history
        if history is None and self.history_version is None:
            history = ScoreHistory()
        return Request(
            history_items=None if history is None else history.items,
            history_times=None if history is None else history.times,
            history_actions=None if history is None else history.actions,
            history_version=self.history_version,
            candidates=self.candidates,
            times=self.times if self.time is None else self.time,  # type: ignore[arg-type]
            user_id=self.user_id,
            user_features=self.user_features,
        )


class SlateHistory(Strict):
    """A history for a slate model, oldest first; actions are codes of the log, 0 and up."""

    items: list[ItemId] = Field(default_factory=list)
    times: list[StrictInt] = Field(default_factory=list)
    actions: list[StrictInt] | None = None


class SlateRequest(Strict):
    """One user's history, which may be empty."""

    history: SlateHistory = Field(default_factory=SlateHistory)


class SlateBody(BaseModel):
    """A slate, and the log-probability of each item given the ones before it."""

    items: list[ItemId]
    log_probs: list[float]
    unknown_history: int


class ScoreAnswer(BaseModel):
    """Probabilities in the order of the candidates; null where the model has no such item.

    `tasks` has those of further tasks, by name.
    """

    probabilities: list[float | None]
    unknown_candidates: list[int]
    unknown_history: int
    history_length: int
    history_version: str
    tasks: dict[str, list[float | None]]


@dataclass(frozen=True)
class SizeLimits:
    """The largest request that is read.

    Attributes:
        max_body_bytes: of the body.
        max_history: items in a history, before it is cut to what the model reads.
        max_candidates: candidates.
    """

    max_body_bytes: int = 4 * 2**20
    max_history: int = 65_536
    max_candidates: int = 16_384


@dataclass(frozen=True)
class ServerSettings:
    """Limits of requests and of batches."""

    sizes: SizeLimits = field(default_factory=SizeLimits)
    batches: BatchLimits = field(default_factory=BatchLimits)


def create_app(
    scorer: Scorer, settings: ServerSettings | None = None, slates: SlateServer | None = None
) -> FastAPI:
    """The application, for uvicorn or a test client; with `slates` it answers /slate as well."""
    settings = settings or ServerSettings()
    metrics = Metrics(scorer, slates=slates is not None)
    scores = Batcher(scorer.score_encoded, settings.batches, metrics.score.batch)
    batchers: list[Batcher[Any, Any]] = [scores]
    app = FastAPI(title="hpgr-plugin", lifespan=_lifespan(batchers))
    app.add_middleware(_BodyLimit, max_bytes=settings.sizes.max_body_bytes)
    _add_error_answers(app)
    _measure_requests(app, metrics)
    metrics.watch_queue(lambda: sum(batcher.num_waiting for batcher in batchers))
    if slates is not None:
        batchers.append(_add_slates(app, slates, settings, metrics))

    @app.post("/score")
    async def score(body: ScoreRequest) -> ScoreAnswer:
        """Score the candidates of one user."""
        if body.history is not None:
            _check_size("history.items", body.history.items, settings.sizes.max_history)
        _check_size("candidates", body.candidates, settings.sizes.max_candidates)
        encoded = scorer.encode(body.as_request())
        answer = _answer(await scores.score(encoded))
        metrics.candidates.inc(len(body.candidates))
        metrics.unknown_candidates.inc(len(answer.unknown_candidates))
        metrics.score.unknown_history.inc(answer.unknown_history)
        return answer

    @app.get("/healthz")
    async def healthz() -> dict[str, Any]:
        """Whether the server takes requests, and which model it has."""
        if scores.stopping:
            raise HTTPException(503, "stopping")
        model = {k: v for k, v in scorer.manifest.items() if k not in ("arguments", "checksums")}
        health: dict[str, Any] = {"status": "ok", "device": str(scorer.device), "model": model}
        if slates is not None:
            generator = slates.generator
            health["slates"] = {
                "device": str(generator.device),
                "num_items": len(generator.item_ids),
                "slate_size": generator.model.slate_size,
            }
        return health

    @app.get("/metrics")
    async def prometheus() -> Response:
        """Counters and times in Prometheus' text format."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


def _add_slates(
    app: FastAPI, slates: SlateServer, settings: ServerSettings, metrics: Metrics
) -> Batcher[History, SlateAnswer]:
    """The route /slate, and what puts its requests together."""
    counted = metrics.routes["/slate"]
    batcher = Batcher(slates.answer, settings.batches, counted.batch)

    @app.post("/slate")
    async def slate(body: SlateRequest) -> SlateBody:
        """A slate for one history."""
        history = body.history
        _check_size("history.items", history.items, settings.sizes.max_history)
        encoded = slates.encode(history.items, history.times, history.actions)
        answer = await batcher.score(encoded)
        counted.unknown_history.inc(answer.unknown_history)
        return SlateBody(
            items=answer.slate.items,
            log_probs=answer.slate.log_probs,
            unknown_history=answer.unknown_history,
        )

    return batcher


def _lifespan(batchers: Sequence[Batcher[Any, Any]]) -> Callable[[FastAPI], Any]:
    """Start the batchers with the server, and stop them with it."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        for batcher in batchers:
            batcher.start()
        yield
        for batcher in batchers:
            await batcher.stop()

    return lifespan


def _measure_requests(app: FastAPI, metrics: Metrics) -> None:
    """Count every answer of a route, and how long it took."""

    @app.middleware("http")
    async def measure(
        request: HttpRequest, call_next: Callable[[HttpRequest], Awaitable[Response]]
    ) -> Response:
        start, status = time.perf_counter(), 500
        try:
            response = await call_next(request)
            status = response.status_code
            return response
        finally:
            counted = metrics.routes.get(request.url.path)
            if counted is not None:
                counted.request(status, time.perf_counter() - start)


def _answer(scores: Scores) -> ScoreAnswer:
    return ScoreAnswer(
        probabilities=_nullable(scores.probabilities),
        unknown_candidates=scores.unknown_candidates,
        unknown_history=scores.unknown_history,
        history_length=scores.history_length,
        history_version=scores.history_version,
        tasks={name: _nullable(values) for name, values in scores.tasks.items()},
    )


def _nullable(values: np.ndarray) -> list[float | None]:
    """The numbers, None in place of NaN."""
    known = np.isfinite(values).tolist()
    return [v if k else None for v, k in zip(values.tolist(), known, strict=True)]


def _check_size(name: str, values: Sequence[Any], most: int) -> None:
    if len(values) > most:
        raise _TooLargeError(name, f"takes at most {most}, got {len(values)}")


class _TooLargeError(RequestError):
    """A request above a limit of size: 413 instead of 422."""


def _add_error_answers(app: FastAPI) -> None:
    """Every error is `{"error": {"field", "problem"}}`."""

    @app.exception_handler(RequestError)
    async def bad_request(_: HttpRequest, error: RequestError) -> JSONResponse:
        statuses = {_TooLargeError: 413, HistoryNotKeptError: 409}
        return _error(statuses.get(type(error), 422), error.field, error.problem)

    @app.exception_handler(RequestValidationError)
    async def bad_body(_: HttpRequest, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return _error(400, "body", f"is no JSON: {first['msg']}")
        return _error(422, _field(first["loc"]), first["msg"])

    @app.exception_handler(OverloadedError)
    async def overloaded(_: HttpRequest, __: OverloadedError) -> JSONResponse:
        return _error(503, None, "too many requests are waiting", {"Retry-After": "1"})

    @app.exception_handler(StoppingError)
    async def stopping(_: HttpRequest, __: StoppingError) -> JSONResponse:
        return _error(503, None, "the server is stopping")


def _error(
    status: int, name: str | None, problem: str, headers: dict[str, str] | None = None
) -> JSONResponse:
    content = {"error": {"field": name, "problem": problem}}
    return JSONResponse(content, status_code=status, headers=headers)


def _field(location: tuple[Any, ...]) -> str:
    """("body", "history", "times", 3, "int") as "history.times[3]"."""
    name = ""
    for part in location[1:]:
        if isinstance(part, int):
            name += f"[{part}]"
        elif part not in ("int", "str", "float", "constrained-int", "constrained-str"):
            name += f".{part}" if name else str(part)
    return name or "body"


class _BodyLimit:
    """Refuses bodies that are too long, by their header or as they come in."""

    def __init__(self, app: Any, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        length = dict(scope["headers"]).get(b"content-length", b"0")
        answer = _error(413, "body", f"takes at most {self.max_bytes} bytes")
        if not length.isdigit() or int(length) > self.max_bytes:
            await answer(scope, receive, send)
            return
        messages, received = [], 0
        while True:  # the whole body is read before the route is called in any case
            message = await receive()
            messages.append(message)
            received += len(message.get("body", b""))
            if received > self.max_bytes:
                await answer(scope, receive, send)
                return
            if not message.get("more_body", False):
                break

        async def replay() -> Any:
            return messages.pop(0) if messages else await receive()

        await self.app(scope, replay, send)
