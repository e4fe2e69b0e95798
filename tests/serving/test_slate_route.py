"""POST /slate: the generator's slates, errors by field, limits, batches, metrics."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from small_slate_model import small_slate_model

from hpgr_plugin.hosts.embedded.report.evaluation import Task
from hpgr_plugin.hosts.embedded.slates.artefact import save_model
from hpgr_plugin.hosts.embedded.slates.generator import History
from hpgr_plugin.serving import Scorer
from hpgr_plugin.serving import __main__ as program
from hpgr_plugin.serving.slates import MODEL_FILE, SlateServer

for package in ("fastapi", "httpx", "prometheus_client", "uvicorn"):
    pytest.importorskip(package, reason="needs the extra serve: pip install '.[serve]'")

from fastapi.testclient import TestClient  # noqa: E402

from hpgr_plugin.serving.app import ServerSettings, SizeLimits, create_app  # noqa: E402
from hpgr_plugin.serving.batcher import BatchLimits  # noqa: E402

ITEMS = [100 + item for item in range(40)]
JSON = {"content-type": "application/json"}
KNOWN: dict[str, Any] = {"items": [103, 139, 120], "times": [5, 5, 9], "actions": [1, 0, 1]}
Served = tuple[TestClient, SlateServer]


@pytest.fixture
def slates(tmp_path: Path) -> SlateServer:
    (tmp_path / "slates").mkdir()
    model = small_slate_model(len(ITEMS), num_actions=2)
    save_model(tmp_path / "slates" / MODEL_FILE, model, item_ids=ITEMS)
    return SlateServer.load(tmp_path / "slates", device="cpu")


@pytest.fixture
def served(
    trained: Callable[..., tuple[Task, Path]], slates: SlateServer
) -> Iterator[tuple[TestClient, SlateServer]]:
    _, folder = trained("hstu")
    settings = ServerSettings(
        SizeLimits(max_body_bytes=5000, max_history=100),
        BatchLimits(wait_seconds=0.3),
    )
    app = create_app(Scorer.load(folder, device="cpu"), settings, slates)
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client, slates


def test_the_answers_are_the_generators_and_are_counted(served: Served) -> None:
    client, slates = served
    wanted = slates.generator.slates([History(*KNOWN.values()), History([], [])])
    more = {"items": [7, *KNOWN["items"]], "times": [1, 5, 5, 9], "actions": [0, 1, 0, 1]}
    bodies = [{"history": KNOWN}, {}, {"history": more}]
    with ThreadPoolExecutor(3) as pool:
        responses = list(pool.map(lambda body: client.post("/slate", json=body), bodies))
    assert [response.status_code for response in responses] == [200] * 3
    answers = [response.json() for response in responses]
    for answer, slate in zip(answers, (wanted[0], wanted[1], wanted[0]), strict=True):
        assert answer["items"] == slate.items
        assert answer["log_probs"] == pytest.approx(slate.log_probs, abs=1e-5)
    assert [answer["unknown_history"] for answer in answers] == [0, 0, 1]
    client.post("/slate", content="{", headers=JSON)
    text = client.get("/metrics").text
    for line in (
        'hpgr_slate_requests_total{status="200"} 3.0',
        'hpgr_slate_requests_total{status="400"} 1.0',
        "hpgr_slate_batch_requests_sum 3.0",
        "hpgr_slate_batch_requests_count 1.0",
        "hpgr_slate_unknown_history_items_total 1.0",
    ):
        assert line in text
    assert 'hpgr_requests_total{status="200"}' not in text
    assert client.get("/healthz").json()["slates"] == {
        "device": "cpu",
        "num_items": len(ITEMS),
        "slate_size": 5,
    }
    assert client.post("/score", json={"candidates": [1], "time": 5}).status_code == 200


@pytest.mark.parametrize(
    ("status", "field", "body"),
    [
        (400, "body", "{not json"),
        (422, "candidates", {"candidates": [100]}),
        (422, "history.items[1]", {"history": {"items": [100, "x"], "times": [1, 2]}}),
        (422, "history.times", {"history": {"items": [100]}}),
        (422, "history.times[1]", {"history": {"items": [100, 101], "times": [5, 4]}}),
        (422, "history.times[0]", {"history": {"items": [100], "times": [-1]}}),
        (422, "history.actions", {"history": {"items": [100], "times": [1], "actions": []}}),
        (422, "history.actions[0]", {"history": {"items": [100], "times": [1], "actions": [2]}}),
        (413, "history.items", {"history": {"items": [1] * 101}}),
        (413, "body", {"history": {"items": [1] * 5000}}),
    ],
)
def test_a_bad_request_is_answered_by_field(
    served: Served, status: int, field: str, body: Any
) -> None:
    client, _ = served
    content = body if isinstance(body, str) else json.dumps(body)
    response = client.post("/slate", content=content, headers=JSON)
    assert response.status_code == status, response.text
    assert response.json()["error"]["field"] == field
    assert response.json()["error"]["problem"]


def test_without_a_slate_model_there_is_no_route(trained: Callable[..., tuple[Task, Path]]) -> None:
    _, folder = trained("hstu")
    with TestClient(create_app(Scorer.load(folder, device="cpu"))) as client:
        assert client.post("/slate", json={}).status_code == 404
        assert "hpgr_slate" not in client.get("/metrics").text
        assert "slates" not in client.get("/healthz").json()


def test_a_folder_without_slates_is_one_line(
    trained: Callable[..., tuple[Task, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder = trained("hstu")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        program.main([f"--model={folder}", f"--slates={tmp_path}", "--device=cpu"])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line == f"error: no model of a slate stage at {tmp_path / MODEL_FILE}"
