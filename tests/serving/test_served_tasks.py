"""Every task of a served model is answered, by the scorer, over HTTP and by the program."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from hpgr_plugin.hosts.embedded.report.evaluation import Task
from hpgr_plugin.serving import Scorer
from hpgr_plugin.serving.folder import read_folder
from hpgr_plugin.serving.package import write_program
from hpgr_plugin.serving.program import ProgramInputs, pad_history, shortest_history
from hpgr_plugin.serving.requests import batch_of

pytest.importorskip("fastapi", reason="needs the extra serve: pip install '.[serve]'")

from fastapi.testclient import TestClient
from small_requests import requests_of
from test_server import body_of

from hpgr_plugin.serving.app import create_app

Trained = Callable[..., tuple[Task, Path]]
# The synthetic log has one field; the tasks of this test are made of it and of the item.
TASKS = [
    "hpgr.prepare_data.tasks = {'same': 'is_click', 'never_seen': 'is_click'}",
    "hpgr.HSTURanker.tasks = ['same']",
    "hpgr.HSTURanker.item_bias = True",
]


@pytest.mark.parametrize("cache_mib", [0, 16])
def test_every_task_is_answered_as_in_the_evaluation(trained: Trained, cache_mib: int) -> None:
    task, folder = trained("pgsa_recent_shared", *TASKS)
    model = read_folder(folder).model
    assert model.task_names == ("same",)
    loader = task.loader("test")
    scored = task.score(model, loader)
    order = np.argsort(scored.rows)
    requests = requests_of(task.data, task.requests)
    answers = Scorer.load(folder, device="cpu", cache_mib=cache_mib).score(requests)
    for found, expected in (
        ([a.probabilities for a in answers], scored.scores),
        ([a.tasks["same"] for a in answers], scored.tasks["same"].scores),
    ):
        np.testing.assert_allclose(np.concatenate(found), expected[order], rtol=0, atol=1e-6)


def test_over_http_and_as_a_program(trained: Trained, tmp_path: Path) -> None:
    task, folder = trained("base", *TASKS)
    scorer = Scorer.load(folder, device="cpu")
    request = requests_of(task.data, task.requests)[0]
    (expected,) = scorer.score([request])
    with TestClient(create_app(scorer)) as client:
        body = body_of(request)
        body["candidates"] = [*body["candidates"], 10**9]
        body["times"] = [*body["times"], max(body["times"])]
        answer = client.post("/score", json=body).json()
    np.testing.assert_allclose(answer["tasks"]["same"][:-1], expected.tasks["same"], atol=1e-6)
    assert answer["tasks"]["same"][-1] is None

    write_program(folder, tmp_path / "served.pt2")
    inputs = ProgramInputs.of(batch_of([scorer.encode(request)]))
    inputs = pad_history(inputs, shortest_history(scorer.model))
    program = torch.export.load(str(tmp_path / "served.pt2")).module()
    with torch.no_grad():
        main, same = program(*inputs)[0].unbind(1)
    np.testing.assert_allclose(main.numpy(), expected.probabilities, rtol=0, atol=1e-5)
    np.testing.assert_allclose(same.numpy(), expected.tasks["same"], rtol=0, atol=1e-5)
