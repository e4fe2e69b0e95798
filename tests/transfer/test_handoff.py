"""The hand-over comes back as it was, or not at all."""

import json

import pytest
import torch
from safetensors.torch import save_file

from hpgr_plugin.components.sem import SessionEnhancementModule
from hpgr_plugin.transfer.handoff import HandoffError, load_handoff, load_sem_state, save_handoff

V, D = 11, 8


def build_sem(**settings) -> SessionEnhancementModule:
    sem = SessionEnhancementModule(**({"embedding_dim": D, "gap_seconds": 600} | settings))
    for parameter in sem.parameters():
        torch.nn.init.normal_(parameter)
    return sem


@pytest.fixture
def table():
    return torch.randn(V, D, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def saved(tmp_path, table):
    path = tmp_path / "stage1" / "handoff.safetensors"
    sem = build_sem()
    save_handoff(
        path,
        item_table=table,
        sem=sem,
        vocabulary_digest="abc",
        gap_seconds=600,
        extra={"epochs": 3},
    )
    return path, sem


def load(path, **changes):
    expected = {
        "num_items": V,
        "embedding_dim": D,
        "vocabulary_digest": "abc",
        "gap_seconds": 600,
    } | changes
    return load_handoff(path, **expected)


def test_round_trip(saved, table):
    path, sem = saved
    handoff = load(path)
    assert torch.equal(handoff.item_table, table)
    assert handoff.header["extra"] == {"epochs": 3}
    other = build_sem()
    load_sem_state(other, handoff)
    for name, value in sem.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


def test_without_sem(tmp_path, table):
    path = tmp_path / "h.safetensors"
    save_handoff(path, item_table=table, sem=None, vocabulary_digest="abc", gap_seconds=600)
    handoff = load(path)
    assert handoff.sem_state is None
    with pytest.raises(HandoffError, match="has no SEM weights"):
        load_sem_state(build_sem(), handoff)


@pytest.mark.parametrize(
    ("name", "value", "there"),
    [
        ("num_items", V + 1, V),
        ("embedding_dim", D * 2, D),
        ("vocabulary_digest", "abd", "'abc'"),
        ("gap_seconds", 1800, 600),
    ],
)
def test_a_mismatch_names_both_sides(saved, name, value, there):
    with pytest.raises(HandoffError, match=f"{name} is {there} there, {value!r} here"):
        load(saved[0], **{name: value})


def test_the_gap_is_compared_only_if_given(saved):
    assert load(saved[0], gap_seconds=None).header["gap_seconds"] == 600


def test_another_format_version(tmp_path, table):
    path = tmp_path / "h.safetensors"
    save_file({"item_table": table}, path, metadata={"hpgr": json.dumps({"format_version": 99})})
    with pytest.raises(HandoffError, match="format_version is 99 there, 1 here"):
        load(path)


def test_a_table_unlike_its_header(tmp_path, table):
    path = tmp_path / "h.safetensors"
    header = {
        "format_version": 1,
        "num_items": V,
        "embedding_dim": D,
        "vocabulary_digest": "abc",
        "gap_seconds": 600,
        "sem": None,
    }
    save_file({"item_table": table[:4]}, path, metadata={"hpgr": json.dumps(header)})
    with pytest.raises(HandoffError, match=r"promises an item table \[11, 8\].*holds \[4, 8\]"):
        load(path)


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", b"\x00" * 64])
def test_a_file_of_another_kind(tmp_path, content):
    path = tmp_path / "h.safetensors"
    path.write_bytes(content)
    with pytest.raises(HandoffError, match=r"h\.safetensors"):
        load(path)


def test_a_safetensors_file_without_header(tmp_path, table):
    path = tmp_path / "h.safetensors"
    save_file({"item_table": table}, path)
    with pytest.raises(HandoffError, match="no hand-over"):
        load(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pooling": "mean"}, "pooling: 'cls' there, 'mean' here"),
        ({"max_sessions": 7}, "max_sessions: 128 there, 7 here"),
        ({"causal": True}, "causal: False there, True here"),
    ],
)
def test_a_sem_of_other_settings_is_left_untouched(saved, settings, message):
    sem = build_sem(**settings)
    before = {name: value.clone() for name, value in sem.state_dict().items()}
    with pytest.raises(HandoffError, match=message):
        load_sem_state(sem, load(saved[0]))
    assert all(torch.equal(sem.state_dict()[name], value) for name, value in before.items())


def test_missing_sem_weights_leave_the_sem_untouched(saved):
    handoff = load(saved[0])
    del handoff.sem_state["gate"]
    sem = build_sem()
    before = {name: value.clone() for name, value in sem.state_dict().items()}
    with pytest.raises(HandoffError, match=r"gate: None there, \[8\] here"):
        load_sem_state(sem, handoff)
    assert all(torch.equal(sem.state_dict()[name], value) for name, value in before.items())


def test_a_failed_save_leaves_the_old_file_and_nothing_else(saved, table):
    path, _ = saved
    with pytest.raises(TypeError):
        save_handoff(
            path,
            item_table=-table,
            sem=None,
            vocabulary_digest="abc",
            gap_seconds=600,
            extra={"not json": object()},
        )
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert torch.equal(load(path).item_table, table)


def test_a_save_that_fails_at_the_last_moment_leaves_nothing(tmp_path, table):
    path = tmp_path / "h.safetensors"
    path.mkdir()
    with pytest.raises(OSError, match=r"h\.safetensors"):
        save_handoff(path, item_table=table, sem=None, vocabulary_digest="abc", gap_seconds=600)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_table_that_is_a_parameter_or_a_view(tmp_path, table):
    path = tmp_path / "h.safetensors"
    view = torch.nn.Parameter(table.T.contiguous()).T
    save_handoff(path, item_table=view, sem=None, vocabulary_digest="abc", gap_seconds=600)
    loaded = load(path).item_table
    assert torch.equal(loaded, table)
    assert not loaded.requires_grad
