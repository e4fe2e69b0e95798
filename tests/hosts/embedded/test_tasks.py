"""Several labels at once, from KuaiRand's own columns: one head and one set of metrics each."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import gin
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_task import ONE_PROCESS, SMALL, killed_at

from hpgr_plugin.cli import load_configs, run_configured
from hpgr_plugin.config.registry import ConfigError, build
from hpgr_plugin.data import DataError, item_mean_scores
from hpgr_plugin.errors import HpgrError, one_line
from hpgr_plugin.hosts.embedded.report.evaluation import Task
from hpgr_plugin.hosts.embedded.report.predictions import load_predictions
from hpgr_plugin.hosts.embedded.train import stages
from hpgr_plugin.hosts.embedded.train.run_directory import RunError
from hpgr_plugin.hosts.embedded.train.stages import (
    FinetuneSettings,
    build_ranker,
    evaluate,
    finetune,
    pretrain,
    task_loss,
)
from hpgr_plugin.hosts.embedded.train.trainer import Trainer, TrainingRun
from hpgr_plugin.metrics import ranking_metrics

TASKS = "TASKS = {'like': 'is_like', 'watched': 'long_view'}"
FILES = [
    f"configs/{name}.gin" for name in ("data/kuairand", "models/hpgr_base", "models/hpgr_rows")
]
LONGER = [f"hpgr.FinetuneSettings.{x}" for x in ("learning_rate = 1e-2", "epochs = 6")]
Configure = Callable[..., Task]
Training = Callable[..., TrainingRun]


@pytest.fixture
def bindings(tmp_path: Path) -> list[str]:
    """Of a small run on a log of 30 users and 40 videos, all of whose events have three labels."""
    random, lines = (
        np.random.default_rng(0),
        ["user_id,video_id,time_ms,is_click,is_like,long_view"],
    )
    quality = random.random(40)
    for user in range(30):
        for event in range(40):
            video = random.integers(40)
            labels = (random.random(3) < quality[video] ** np.array([1.0, 2.0, 0.5])).astype(int)
            time = 1_650_000_000_000 + 1000 * (600 * event + user)
            lines.append(f"{user},{video},{time},{','.join(map(str, labels))}")
    (tmp_path / "log_standard_1.csv").write_text("\n".join(lines) + "\n")
    small = [binding for binding in SMALL if not binding.startswith("NUM_USERS")]
    return [*small, f"DATA_DIR = '{tmp_path}'", "CACHE_DIR = None", "MAX_CANDIDATES = 8"]


@pytest.fixture
def configure(bindings: list[str]) -> Iterator[Configure]:
    def apply(*more: str) -> Task:
        gin.clear_config()
        load_configs(FILES, [*bindings, *more])
        return Task(build("prepare_data"), build("RequestSettings"), ONE_PROCESS)

    yield apply
    gin.clear_config()


def test_the_main_task_starts_from_the_same_weights_and_has_the_same_logits(
    configure: Configure,
) -> None:
    models = []
    for more in ([], [TASKS]):
        task = configure("hpgr.HSTURanker.item_bias = True", *more)
        torch.manual_seed(5)
        models.append(build_ranker(task).eval())
    alone, several = models
    weights, others = alone.state_dict(), several.state_dict()
    assert all(torch.equal(others.pop(name), weight) for name, weight in weights.items())
    assert others
    assert all(name.startswith("task_heads.") for name in others)
    batch = next(iter(task.loader("test").batches()))
    with torch.no_grad():
        every = several(batch, every_task=True)
        assert torch.equal(alone(batch), several(batch))
    assert torch.equal(every[0], several(batch))
    assert every.shape == (3, batch.num_candidates)
    assert not torch.equal(every[1], every[2])


def test_one_task_has_the_loss_of_one_cross_entropy(
    configure: Configure, training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parameters after training are those of a loss that knows no tasks, to the last bit."""

    def trained(folder: str) -> dict[str, torch.Tensor]:
        task = configure("hpgr.FinetuneSettings.epochs = 1")
        finetune(task, build("FinetuneSettings"), training(folder))
        path = training(folder).output_dir / "checkpoint.pt"
        model: dict[str, torch.Tensor] = stages.load_checkpoint(path, torch.device("cpu"))["model"]
        return model

    def plain(model, groups, loss, **others):  # type: ignore[no-untyped-def]
        def cross_entropy(forward, planned, step):  # type: ignore[no-untyped-def]
            batch = planned.batch
            logits = forward(batch).float()
            total = F.binary_cross_entropy_with_logits(
                logits, batch.candidate_labels, reduction="sum"
            )
            return total, batch.num_candidates

        return Trainer(model=model, groups=groups, loss=cross_entropy, **others)

    weights = trained("tasks")
    monkeypatch.setattr(stages, "Trainer", plain)
    expected = trained("plain")
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_every_task_has_its_metrics_and_predictions(
    configure: Configure, training: Training
) -> None:
    task = configure(TASKS, *LONGER)
    metrics = finetune(task, build("FinetuneSettings"), training())
    log, folder = task.data.log, training().output_dir
    for name in ("like", "watched"):
        stored = load_predictions(folder / f"predictions_{name}.npz")
        rows = np.sort(task.loader("test").candidate_rows())
        np.testing.assert_array_equal(stored.label, log.task_labels[name][rows])
        again = ranking_metrics(stored.label, stored.score, stored.user)
        for metric, value in again.items():
            assert metrics[f"{name}/{metric}"] == pytest.approx(value, abs=1e-6)
        assert metrics[f"{name}/auc"] > 0.55  # learnable: the videos' quality
        assert f"{name}/auc" in metrics["history"][0]
    again = evaluate(task, folder)
    assert {k: v for k, v in again.items() if "auc" in k} == {
        k: v for k, v in metrics.items() if "auc" in k
    }


def test_the_weights_scale_the_losses(configure: Configure) -> None:
    task = configure(TASKS)
    model = build_ranker(task).eval()
    batch = next(iter(task.loader("train").batches()))
    logits = model(batch, every_task=True)
    labels = [batch.candidate_labels, batch.task_labels["like"], batch.task_labels["watched"]]
    settings = FinetuneSettings(pairwise_weight=0.5, task_weights={"like": 0.25})
    assert settings.weights_of(model.task_names) == [1.0, 0.25, 1.0]
    each = [
        task_loss(*pair, batch.candidate_offsets, settings)
        for pair in zip(logits, labels, strict=True)
    ]
    gradients = []
    for weights in ([1.0, 0.25, 1.0], [1.0, 1.0, 1.0]):
        total = sum(w * loss for w, loss in zip(weights, each, strict=True))
        gradients.append(
            torch.autograd.grad(total, list(model.task_heads.parameters()), retain_graph=True)
        )
    half = len(gradients[0]) // 2
    for scaled, plain in zip(gradients[0][:half], gradients[1][:half], strict=True):
        torch.testing.assert_close(scaled, 0.25 * plain)


def test_the_trainer_uses_the_weights(configure: Configure, training: Training) -> None:
    """A row with a tiny weight leaves the task's head almost where it began."""
    moved = []
    for weight in ("1e-30", "1.0"):
        task = configure(TASKS, f"hpgr.FinetuneSettings.task_weights = {{'like': {weight}}}")
        finetune(task, build("FinetuneSettings"), training(weight))
        state = stages.load_checkpoint(
            training(weight).output_dir / "checkpoint.pt", torch.device("cpu")
        )["model"]
        moved.append(state["task_heads.task_like.head.3.bias"])
    stages.seed_everything(0)
    start = build_ranker(task).task_heads["task_like"].head[3].bias
    assert (moved[0] - start).abs() < 1e-12 < (moved[1] - start).abs()


def test_an_interrupted_training_of_several_tasks_continues(
    configure: Configure, training: Training
) -> None:
    def train(folder: str, resume: bool = False) -> dict:
        task = configure(TASKS, "hpgr.FinetuneSettings.checkpoint_every = 2")
        metrics = finetune(task, build("FinetuneSettings"), training(folder, resume=resume))
        return {name: value for name, value in metrics.items() if "auc" in name}

    whole = train("whole")
    with killed_at(5):
        train("killed")
    assert train("killed", resume=True) == whole


def test_stage_2_with_tasks_takes_the_hand_over_of_stage_1(
    configure: Configure, training: Training
) -> None:
    """Stage 1 reads no labels: its hand-over fits a ranker with any tasks."""
    handoff = pretrain(configure(), build("PretrainSettings"), training()).handoff
    model = build_ranker(configure(TASKS), pretrained=handoff)
    assert model.inherited == ("item_table",)
    assert model.task_names == ("like", "watched")


def test_an_ablation_shows_every_task_and_the_baseline(
    bindings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of two rows one has a head for a single task; another set of tasks is another run."""
    path = tmp_path / "run.gin"
    lines = [
        *(f"include '{file}'" for file in FILES),
        *(*bindings, TASKS, "hpgr.FinetuneSettings.epochs = 1", "hpgr.run.mode = 'ablation'"),
        f"hpgr.run.output_dir = '{tmp_path / 'out'}'",
        "hpgr.run.rows = ['hstu', 'one']",
        "one/hpgr.AblationRow.title = 'one further task'",
        "one/hpgr.HSTURanker.tasks = ['like']",
    ]
    path.write_text("\n".join(lines) + "\n")
    gin.clear_config()
    run_configured(str(path), [])
    table = (tmp_path / "out" / "table.md").read_text().splitlines()
    cells = {line.split("|")[1].strip(): line.split("|") for line in table if "|" in line}
    titles = [cell.strip() for cell in cells["model"]]
    for title in ("AUC, like", "GAUC, like", "AUC, watched", "GAUC, watched"):
        place = titles.index(title)
        assert float(cells["item mean"][place]) > 0.5
        assert float(cells["HSTU"][place]) > 0
        assert (cells["one further task"][place].strip() == "-") == ("watched" in title)
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["metrics"]["rows"]
    assert rows[1]["summary"]["like/gauc"]["mean"] == rows[1]["seeds"][0]["like/gauc"]

    gin.clear_config()
    with pytest.raises(RunError, match=r"hpgr.prepare_data.tasks was .*'watched'"):
        run_configured(str(path), ["TASKS = {'like': 'is_like'}"])
    gin.clear_config()
    with pytest.raises(HpgrError, match=r"prepare_data.tasks takes no tasks in mode 'slates'"):
        run_configured(str(path), ["hpgr.run.mode = 'slates'"])


def test_a_rule_can_make_a_task(configure: Configure) -> None:
    task = configure(
        "hpgr.prepare_data.tasks = {'late': @late/hpgr.rating_at_least(), 'like': 'is_like'}",
        "late/hpgr.rating_at_least.field = 'video_id'",
        "late/hpgr.rating_at_least.threshold = 20",
    )
    log = task.data.log
    np.testing.assert_array_equal(log.task_labels["late"], log.item_ids[log.item] >= 20)
    scored = item_mean_scores(task.data, "test", task.requests)
    assert ranking_metrics(*scored.tasks["late"][:3])["auc"] > 0.99  # a property of the item


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        ("{'like': 'is_liked'}", "'is_liked'"),
        ("{'like': 'video_id'}", "field 'video_id': takes 0 or 1 as a label"),
        ("{'': 'is_like'}", "names of letters, digits and _"),
        ("{'a/b': 'is_like'}", "names of letters, digits and _"),
        ("{'like': @hpgr.GlobalTimeSplit()}", r"tasks\['like'\] takes a field, @hpgr"),
        ("{'like': 5}", "prepare_data.tasks takes a dict, each value a string or @hpgr"),
        ("['is_like']", "prepare_data.tasks takes a dict, each value a string or @hpgr"),
    ],
)
def test_tasks_that_the_data_does_not_have(configure: Configure, tasks: str, words: str) -> None:
    with pytest.raises(HpgrError) as caught:
        configure(f"hpgr.prepare_data.tasks = {tasks}")
    assert re.search(words, one_line(caught.value))


@pytest.mark.parametrize(
    ("more", "error", "words"),
    [
        (
            ["hpgr.FinetuneSettings.task_weights = {'lik': 2}"],
            ConfigError,
            r"task_weights takes tasks of hpgr.HSTURanker.tasks, which are \['like', 'watched'\]",
        ),
        (
            ["hpgr.FinetuneSettings.task_weights = {'like': 0.0}"],
            HpgrError,
            r"FinetuneSettings.task_weights\['like'\] takes a number above 0, got 0.0",
        ),
        (
            ["hpgr.FinetuneSettings.task_weights = {'like': -1}"],
            HpgrError,
            r"FinetuneSettings.task_weights\['like'\] takes a number above 0, got -1",
        ),
        (
            ["hpgr.FinetuneSettings.task_weights = {'like': 'much'}"],
            ConfigError,
            "FinetuneSettings.task_weights takes a dict, each value a number",
        ),
        (["hpgr.HSTURanker.tasks = ['lik']"], HpgrError, "hpgr.HSTURanker.tasks takes tasks of"),
    ],
)
def test_bindings_of_tasks_that_do_not_fit(
    configure: Configure,
    training: Training,
    more: Sequence[str],
    error: type[Exception],
    words: str,
) -> None:
    with pytest.raises(error, match=words):
        finetune(configure(TASKS, *more), build("FinetuneSettings"), training())


def test_a_task_with_one_label_stops_before_training(
    configure: Configure, training: Training
) -> None:
    task = configure(TASKS)
    labels = {**task.data.log.task_labels, "like": np.zeros_like(task.data.log.label)}
    data = replace(task.data, log=replace(task.data.log, task_labels=labels))
    with pytest.raises(DataError, match=r"every candidate of the train split has the label 0 of.*"):
        finetune(replace(task, data=data), build("FinetuneSettings"), training())
