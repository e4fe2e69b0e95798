"""SlateGenerator: answers are those of the model, and a mistake of the caller is one line."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_slate_model import small_slate_model

from hpgr_plugin.errors import HpgrError
from hpgr_plugin.hosts.embedded.report.evaluation import Task
from hpgr_plugin.hosts.embedded.slates.artefact import save_model
from hpgr_plugin.hosts.embedded.slates.generator import History, SlateGenerator


@pytest.fixture
def task(configure: Callable[..., Task]) -> Task:
    return configure()


@pytest.fixture
def generator(task: Task, tmp_path: Path) -> SlateGenerator:
    log = task.data.log
    model = small_slate_model(log.num_items, log.num_actions, log.item_vocabulary_digest)
    save_model(tmp_path / "slates.safetensors", model, item_ids=log.item_ids.tolist())
    return SlateGenerator.load(tmp_path / "slates.safetensors")


def test_answers_are_those_of_evaluation(task: Task, generator: SlateGenerator) -> None:
    """What serving answers to a history is what was measured on it."""
    ids = task.data.log.item_ids
    for batch in task.loader("test").batches():
        measured = generator.model.generate(batch)
        histories = []
        for start, end in batch.history_offsets.unfold(0, 2, 1).tolist():
            items, times, actions = (
                x[start:end].tolist()
                for x in (batch.history_items, batch.history_timestamps, batch.history_actions)
            )
            histories.append(History(ids[items].tolist(), times, actions))
        answers = generator.slates(histories)
        assert [a.items for a in answers] == ids[measured.items.numpy()].tolist()
        scores = torch.tensor([answer.log_probs for answer in answers])
        torch.testing.assert_close(scores, measured.log_probs, rtol=0, atol=1e-5)


def test_the_python_of_the_guide(
    generator: SlateGenerator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    guide = Path(__file__).parents[4] / "docs" / "slates.md"
    code = re.findall(r"```python\n(.*?)```", guide.read_text(), re.DOTALL)[0]
    code = re.sub(r'load\(".*?"\)', f"load({str(tmp_path / 'slates.safetensors')!r})", code)
    exec(code, {})
    assert len(eval(capsys.readouterr().out)) == generator.model.slate_size


def test_an_empty_history_is_answered(generator: SlateGenerator) -> None:
    alone = generator.slates([History([], [])])[0]
    beside = generator.slates([History([], []), History([3, 4], [10, 20])])[0]
    assert len(set(alone.items)) == 5
    assert alone.items == beside.items
    assert generator.slates([]) == []


def test_unknown_items_are_passed_over_and_old_ones_cut(generator: SlateGenerator) -> None:
    known = generator.slates([History([3, 4], [10, 20])])
    assert generator.slates([History(["?", 3, 4, "new"], [5, 10, 20, 30])]) == known
    many = [*range(100), 3, 4]
    cut = generator.slates([History(many, list(range(102)))])
    assert cut == generator.slates([History(many[-60:], list(range(42, 102)))])


@pytest.mark.parametrize(
    ("history", "words"),
    [
        (History([1, 2], [5]), "as many timestamps and actions as items"),
        (History([1, 2], [5, 4]), "in order of time"),
        (History([1], [5], [99]), "actions of 0 to"),
    ],
)
def test_a_mistake_is_one_line(generator: SlateGenerator, history: History, words: str) -> None:
    with pytest.raises(HpgrError, match=words):
        generator.slates([history])
