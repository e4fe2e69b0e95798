"""The HTTP server: answers, errors by field, limits, batches, metrics, and a graceful stop."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpgr_plugin.hosts.embedded.report.evaluation import Task
from hpgr_plugin.serving import Request, Scorer

for package in ("fastapi", "httpx", "prometheus_client", "uvicorn"):
    pytest.importorskip(package, reason="needs the extra serve: pip install '.[serve]'")

import httpx  # noqa: E402
from fastapi.testclient import TestClient  # noqa: E402
from small_requests import requests_of  # noqa: E402

from hpgr_plugin.serving.app import ServerSettings, SizeLimits, create_app  # noqa: E402
from hpgr_plugin.serving.batcher import (  # noqa: E402
    Batcher,
    BatchLimits,
    OverloadedError,
    StoppingError,
)

Trained = Callable[..., tuple[Task, Path]]
ROOT = Path(__file__).parents[2]
JSON = {"content-type": "application/json"}


def body_of(request: Request) -> dict[str, Any]:
    return {
        "history": {
            "items": request.history_items,
            "times": request.history_times,
            "actions": request.history_actions,
        },
        "candidates": request.candidates,
        "times": request.times,
        "user_id": request.user_id,
    }


@pytest.fixture
def served(trained: Trained) -> Iterator[tuple[TestClient, Scorer, list[Request]]]:
    task, folder = trained("pgsa_recent_shared")
    scorer = Scorer.load(folder, device="cpu")
    limits = ServerSettings(SizeLimits(max_body_bytes=20_000, max_history=100, max_candidates=20))
    with TestClient(create_app(scorer, limits), raise_server_exceptions=False) as client:
        yield client, scorer, requests_of(task.data, task.requests)


Served = tuple[TestClient, Scorer, list[Request]]


def test_the_answer_is_the_scorers(served: Served) -> None:
    client, scorer, requests = served
    for request in requests[:5]:
        (expected,) = scorer.score([request])
        response = client.post("/score", json=body_of(request))
        assert response.status_code == 200
        answer = response.json()
        np.testing.assert_allclose(
            answer["probabilities"], expected.probabilities, rtol=0, atol=1e-6
        )
        assert answer["history_version"] == expected.history_version
        assert answer["unknown_candidates"] == []


def test_an_unknown_candidate_is_null(served: Served) -> None:
    client, _, requests = served
    known = requests[0].candidates[0]
    response = client.post("/score", json={"candidates": [10**9, known], "time": 5})
    first, second = response.json()["probabilities"]
    assert first is None
    assert 0 < second < 1
    assert response.json()["unknown_candidates"] == [0]


@pytest.mark.parametrize(
    ("status", "field", "body"),
    [
        (400, "body", "{not json"),
        (422, "candidates", {"time": 5}),
        (422, "candidates[1]", {"candidates": [1, [2]], "time": 5}),
        (422, "candidates[0]", {"candidates": ["x"], "time": 5}),
        (422, "time", {"candidates": [1]}),
        (422, "time", {"candidates": [1], "time": 5, "times": [5]}),
        (422, "time", {"candidates": [1], "time": "now"}),
        (422, "history.itms", {"candidates": [1], "time": 5, "history": {"itms": [1]}}),
        (422, "history.times", {"candidates": [1], "time": 5, "history": {"items": [1]}}),
        (422, "user_features.age", {"candidates": [1], "time": 5, "user_features": {"age": 1}}),
        (413, "candidates", {"candidates": [1] * 21, "time": 5}),
        (413, "history.items", {"candidates": [1], "time": 5, "history": {"items": [1] * 101}}),
        (413, "body", {"candidates": [1] * 20_000, "time": 5}),
    ],
)
def test_a_bad_request_is_answered_by_field(
    served: Served, status: int, field: str, body: Any
) -> None:
    client, _, _ = served
    content = body if isinstance(body, str) else json.dumps(body)
    response = client.post("/score", content=content, headers=JSON)
    assert response.status_code == status, response.text
    assert response.json()["error"]["field"] == field
    assert response.json()["error"]["problem"]


def test_a_history_is_named_by_its_version(served: Served) -> None:
    client, scorer, requests = served
    body = {**body_of(requests[0]), "time": max(requests[0].times)}  # type: ignore[type-var,arg-type]
    del body["times"]
    wanted = client.post("/score", json=body).json()
    del body["history"]
    body["history_version"] = wanted["history_version"]
    answer = client.post("/score", json=body)
    assert answer.status_code == 200
    np.testing.assert_allclose(answer.json()["probabilities"], wanted["probabilities"], atol=1e-6)
    assert answer.json()["history_version"] == wanted["history_version"]
    twice = client.post("/score", json={**body, "history": {"items": []}})
    assert (twice.status_code, twice.json()["error"]["field"]) == (422, "history_version")
    early = client.post("/score", json={**body, "time": 0})
    assert (early.status_code, early.json()["error"]["field"]) == (422, "times")
    scorer.cache.clear()
    gone = client.post("/score", json=body)
    assert (gone.status_code, gone.json()["error"]["field"]) == (409, "history_version")
    assert "send the history" in gone.json()["error"]["problem"]
    assert 'hpgr_requests_total{status="409"} 1.0' in client.get("/metrics").text


def test_a_request_that_fails_leaves_its_batch_alone() -> None:
    async def run() -> list[Any]:
        batcher = Batcher(
            lambda batch: [KeyError(one) if one % 2 else one for one in batch],
            BatchLimits(wait_seconds=0.2),
        )
        batcher.start()
        answers = await asyncio.gather(*map(batcher.score, range(4)), return_exceptions=True)
        await batcher.stop()
        return answers

    answers = asyncio.run(run())
    assert answers[::2] == [0, 2]
    assert all(isinstance(answer, KeyError) for answer in answers[1::2])


def test_health_and_metrics(served: Served) -> None:
    client, _, requests = served
    health = client.get("/healthz").json()
    assert health["status"] == "ok"
    assert health["model"]["trained_steps"] > 0
    for _ in range(2):
        client.post("/score", json=body_of(requests[0]))
    client.post("/score", content="{", headers=JSON)
    text = client.get("/metrics").text
    for line in (
        'hpgr_requests_total{status="200"} 2.0',
        'hpgr_requests_total{status="400"} 1.0',
        f"hpgr_candidates_total {2.0 * len(requests[0].candidates)}",
        'hpgr_history_cache_total{outcome="hits"} 1.0',
        'hpgr_history_cache_total{outcome="misses"} 1.0',
        "hpgr_history_cache_users 1.0",
        "hpgr_waiting_requests 0.0",
    ):
        assert line in text


def test_requests_are_scored_together(served: Served) -> None:
    _, scorer, requests = served
    coded = [scorer.encode(request) for request in requests[:10]]
    expected = scorer.score(requests[:10])
    sizes: list[int] = []

    async def run() -> Any:
        batcher = Batcher(
            scorer.score_encoded,
            BatchLimits(wait_seconds=0.2, max_requests=4),
            lambda size, seconds: sizes.append(size),
        )
        batcher.start()
        answers = await asyncio.gather(*map(batcher.score, coded))
        await batcher.stop()
        return answers

    for answer, wanted in zip(asyncio.run(run()), expected, strict=True):
        np.testing.assert_allclose(answer.probabilities, wanted.probabilities, atol=1e-6)
    assert sizes == [4, 4, 2]


def test_too_many_waiting_and_stopping_are_refused(served: Served) -> None:
    _, scorer, requests = served
    coded = scorer.encode(requests[0])
    go = threading.Event()

    def slow(batch: Any) -> Any:
        go.wait(10)
        return scorer.score_encoded(batch)

    async def run() -> None:
        batcher = Batcher(slow, BatchLimits(wait_seconds=0, max_requests=1, max_waiting=2))
        batcher.start()
        first = asyncio.create_task(batcher.score(coded))
        await asyncio.sleep(0.05)
        waiting = [asyncio.create_task(batcher.score(coded)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError):
            await batcher.score(coded)
        stopping = asyncio.create_task(batcher.stop())
        await asyncio.sleep(0)
        with pytest.raises(StoppingError):
            await batcher.score(coded)
        go.set()
        assert len(await asyncio.gather(first, *waiting)) == 3
        await stopping

    asyncio.run(run())


def test_a_batch_that_fails_leaves_the_server_running(served: Served) -> None:
    client, scorer, requests = served
    forward = scorer.model.forward
    scorer.model.forward = lambda batch: 1 / 0  # type: ignore[method-assign,assignment]
    assert client.post("/score", json=body_of(requests[0])).status_code == 500
    scorer.model.forward = forward  # type: ignore[method-assign]
    assert client.post("/score", json=body_of(requests[0])).status_code == 200
    assert 'hpgr_requests_total{status="500"} 1.0' in client.get("/metrics").text


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_real_process_serves_and_stops_gracefully(trained: Trained) -> None:
    task, folder = trained("hstu")
    requests = requests_of(task.data, task.requests)
    expected = Scorer.load(folder, device="cpu").score(requests)
    port = free_port()
    command = [sys.executable, "-m", "hpgr_plugin.serving", f"--model={folder}", f"--port={port}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "--batch_wait_ms=2000"], env=environment, stderr=subprocess.PIPE, text=True
    )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_healthy(url, process)
        with ThreadPoolExecutor(8) as pool:
            bodies = map(body_of, requests)
            post = lambda body: httpx.post(f"{url}/score", json=body, timeout=60)  # noqa: E731
            answers = list(pool.map(post, bodies))
            for answer, wanted in zip(answers, expected, strict=True):
                np.testing.assert_allclose(
                    answer.json()["probabilities"], wanted.probabilities, rtol=0, atol=1e-6
                )
            client = [sys.executable, str(ROOT / "examples/serving/client.py"), f"--url={url}"]
            items = map(str, task.data.log.item_ids[:4].tolist())
            shown = subprocess.run(
                [*client, "--items", *items], capture_output=True, text=True, check=True
            )
            assert shown.stdout.count("{'probabilities'") == 6
            text = httpx.get(f"{url}/metrics").text
            assert 'hpgr_history_cache_total{outcome="hits"} 3.0' in text  # named
            assert 'status="409"' not in text
            load = [sys.executable, str(ROOT / "examples/serving/load.py"), f"--url={url}"]
            load += [f"--model={folder}", "--seconds=1", "--clients=2", "--history=5", "--named"]
            shown = subprocess.run(load, capture_output=True, text=True, check=True)
            assert "statuses {200: " in shown.stdout
            assert "422" not in shown.stdout.splitlines()[0].split("statuses")[1]
            under_way = pool.submit(post, body_of(requests[0]))
            time.sleep(1.0)  # it waits for its batch
            process.send_signal(signal.SIGTERM)
            assert under_way.result().status_code == 200
        process.wait(timeout=30)
    finally:
        process.kill()
    assert "Traceback" not in process.stderr.read()  # type: ignore[union-attr]


def wait_until_healthy(url: str, process: subprocess.Popen) -> None:
    for _ in range(600):
        assert process.poll() is None, process.stderr.read()  # type: ignore[union-attr]
        try:
            if httpx.get(f"{url}/healthz").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.1)
    raise AssertionError("the server did not start in a minute")


def test_a_folder_without_a_model_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hpgr_plugin.serving", f"--model={tmp_path}"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert "holds no model to serve" in last
