"""The served folder: complete, checked, and readable without what it was made from."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hpgr_plugin.data.log import CategoricalFeature, InteractionLog
from hpgr_plugin.hosts.embedded.report.evaluation import Task
from hpgr_plugin.serving import FolderError, RequestError
from hpgr_plugin.serving.folder import MANIFEST, WEIGHTS, read_folder
from hpgr_plugin.serving.vocabulary import Vocabulary

Trained = Callable[..., tuple[Task, Path]]


@pytest.mark.parametrize("file", ["model.safetensors", "model.gin", "vocabulary.npz"])
@pytest.mark.parametrize("how", ["missing", "cut", "changed"])
def test_a_damaged_folder_is_refused(trained: Trained, file: str, how: str) -> None:
    _, folder = trained("hstu")
    path = folder / file
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        middle = len(content) // 2
        changed = bytes([content[middle] ^ 1]) + content[middle + 1 :]
        path.write_bytes(content[:middle] + (changed if how == "changed" else b""))
    with pytest.raises(FolderError, match=f"{file} is missing or damaged"):
        read_folder(folder)


def test_no_folder_a_damaged_manifest_and_another_format(trained: Trained) -> None:
    _, folder = trained("hstu")
    with pytest.raises(FolderError, match="holds no model to serve"):
        read_folder(folder / "nowhere")
    manifest = folder / MANIFEST
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**content, "format_version": 99}))
    with pytest.raises(FolderError, match="format version 99, this code reads"):
        read_folder(folder)
    manifest.write_text("{")
    with pytest.raises(FolderError, match="damaged"):
        read_folder(folder)


def test_the_folder_can_be_moved_and_read_by_others(trained: Trained, tmp_path: Path) -> None:
    _, folder = trained("full_shared")
    moved = tmp_path / "elsewhere"
    shutil.move(folder, moved)
    shutil.rmtree(tmp_path / "full_shared")
    served = read_folder(moved)
    assert served.model.sem is not None
    assert served.model.sem.causal is True
    assert not served.model.training
    assert served.settings.max_history == 60
    assert (moved / WEIGHTS).stat().st_mode & 0o044 == (moved / MANIFEST).stat().st_mode & 0o044


def log(**changes: object) -> InteractionLog:
    fields: dict = {
        "user_offsets": np.array([0, 2, 3]),
        "item": np.array([0, 2, 1], np.int32),
        "timestamp": np.array([1, 2, 3]),
        "action": np.array([0, 1, 2], np.int16),
        "label": np.array([0, 1, 1], np.int8),
        "item_ids": np.array([3, 5, 900]),
        "user_ids": np.array(["ann", "bob"]),
        "num_actions": 3,
        "item_vocabulary_digest": "",
        "action_values": np.array([1.0, 4.0, 5.0]),
        "user_features": {
            "city": CategoricalFeature(np.array([2, 0], np.int32), 3, np.array(["Oslo", "Rome"]))
        },
    }
    return InteractionLog(**{**fields, **changes})


def test_vocabulary_of_integers_and_values() -> None:
    arrays = Vocabulary.of(log()).arrays()
    vocabulary = Vocabulary.from_arrays(arrays)
    assert vocabulary.items([900, 4, 3, -1, 10**12], "x").tolist() == [2, -1, 0, -1, -1]
    assert vocabulary.actions([5, 1.0, 4], "x").tolist() == [2, 0, 1]
    with pytest.raises(RequestError, match=r"x\[1\]: takes one of 1.0, 4.0, 5.0, got 2"):
        vocabulary.actions([1, 2], "x")
    with pytest.raises(RequestError, match=r"x\[0\]: .* are an integer, got '3'"):
        vocabulary.items(["3"], "x")
    with pytest.raises(RequestError, match=r"x\[0\]: takes a 64-bit integer"):
        vocabulary.items([2**80], "x")


def test_vocabulary_of_text() -> None:
    vocabulary = Vocabulary.of(log(item_ids=np.array(["a", "b", "ü"])))
    assert vocabulary.items(["ü", "a", "longer than any", ""], "x").tolist() == [2, 0, -1, -1]
    with pytest.raises(RequestError, match=r"x\[0\]: .* are text, got 1"):
        vocabulary.items([1], "x")


def test_user_features_of_the_log_of_the_request_and_of_nobody() -> None:
    vocabulary = Vocabulary.from_arrays(Vocabulary.of(log()).arrays())

    def city(user: object, **given: object) -> int:
        return vocabulary.user_feature_codes(user, given)["city"]  # type: ignore[arg-type]

    assert city("ann") == 2
    assert city("bob") == 0
    assert city("carla") == 0
    assert city(7) == 0
    assert city(None) == 0
    assert city("ann", city="Oslo") == 1
    assert city(None, city="Rome") == 2
    assert city("ann", city="Paris") == 0
    assert city("ann", city=None) == 0
    with pytest.raises(RequestError, match=r"user_features\.age: no such feature.*city"):
        city("ann", age=3)


def test_actions_without_known_values_are_codes() -> None:
    vocabulary = Vocabulary.from_arrays(Vocabulary.of(log(action_values=None)).arrays())
    assert vocabulary.actions([2, 0], "x").tolist() == [2, 0]
