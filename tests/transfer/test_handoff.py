"""The hand-over comes back as it was, or not at all."""

import json
import os
import stat
import zlib

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from hpgr_plugin.components.item_features import ItemFeatures
from hpgr_plugin.components.sem import SessionEnhancementModule
from hpgr_plugin.transfer.handoff import (
    HandoffError,
    load_feature_state,
    load_handoff,
    load_sem_state,
    read_header,
    save_handoff,
)

V, D = 11, 8


def build_sem(**settings) -> SessionEnhancementModule:
    defaults = {"embedding_dim": D, "gap_seconds": 600, "causal": False}
    sem = SessionEnhancementModule(**(defaults | settings))
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


def test_item_features_come_back_or_are_named(tmp_path, table, saved):
    path = tmp_path / "h.safetensors"
    made = ItemFeatures({"genre": torch.arange(V) % 4, "year": torch.arange(V)}, D)
    arguments = {"vocabulary_digest": "abc", "gap_seconds": 600}
    sem = build_sem()
    save_handoff(path, item_table=table, sem=sem, item_features=made, **arguments)
    handoff = load(path)
    assert handoff.sem_state.keys() == sem.state_dict().keys()
    other = ItemFeatures({"genre": torch.arange(V) % 4, "year": torch.arange(V)}, D)
    load_feature_state(other, handoff)
    for name, value in made.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
    fewer = ItemFeatures({"genre": torch.arange(V) % 4}, D)
    with pytest.raises(HandoffError, match=r"other item features: tables\.year\.weight"):
        load_feature_state(fewer, handoff)
    without = load(saved[0])
    assert without.feature_state is None
    with pytest.raises(HandoffError, match="has no item features"):
        load_feature_state(fewer, without)


def test_options_of_sem_are_part_of_its_settings(tmp_path, table):
    path = tmp_path / "h.safetensors"
    sem = build_sem(own_session=True)
    save_handoff(path, item_table=table, sem=sem, vocabulary_digest="abc", gap_seconds=600)
    load_sem_state(build_sem(own_session=True), load(path))
    with pytest.raises(HandoffError, match="own_session is True there, None here"):
        load_sem_state(build_sem(), load(path))


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


def rewrite(path, change):
    """Write the file anew after `change(tensors, header)`, the header's checksum included."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["hpgr"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    changed = change(tensors, header)
    text = json.dumps(changed if isinstance(changed, list) else header)
    checksum = str(zlib.crc32(text.encode()))
    save_file(tensors, path, metadata={"hpgr": text, "hpgr_checksum": checksum})


def test_a_table_unlike_its_header(saved, table):
    rewrite(saved[0], lambda tensors, _: tensors.update(item_table=table[:4].clone()))
    with pytest.raises(HandoffError, match=r"promises an item table \[11, 8\], found \[4, 8\]"):
        load(saved[0])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["item_table", "sem.gate"])
def test_values_that_are_not_finite(tmp_path, table, name, value):
    path, sem = tmp_path / "h.safetensors", build_sem()
    with torch.no_grad():
        {"item_table": table[3], "sem.gate": sem.gate}[name][5] = value
    save_handoff(path, item_table=table, sem=sem, vocabulary_digest="abc", gap_seconds=600)
    with pytest.raises(HandoffError, match=rf"h\.safetensors: tensor '{name}' .* not finite"):
        load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _, header: header.pop("gap_seconds"), "has no gap_seconds"),
        (lambda _, header: header.update(num_items="11"), "has num_items = '11'"),
        (lambda _, header: header.update(sem=["cls"]), r"has sem = \['cls'\]"),
        (lambda _, header: header.update(embedding_dim=True), "has embedding_dim = True"),
        (lambda _, header: [header], "its header is a list"),
        (lambda tensors, _: tensors.pop("sem.gate"), r"disagree .* \['sem\.gate'\]"),
        (lambda tensors, _: tensors.pop("item_table"), "found None"),
    ],
)
def test_a_broken_header(saved, change, message):
    path = saved[0]
    rewrite(path, change)
    with pytest.raises(HandoffError, match=rf"handoff\.safetensors.*{message}"):
        load(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"text"', "{}"])
def test_a_header_that_is_no_json_object(tmp_path, table, text):
    path = tmp_path / "h.safetensors"
    save_file({"item_table": table}, path, metadata={"hpgr": text})
    for read in (load, read_header):
        with pytest.raises(HandoffError, match=r"h\.safetensors"):
            read(path)


def test_every_flipped_bit_is_found(tmp_path):
    path = tmp_path / "h.safetensors"
    table = torch.randn(2, 2)
    save_handoff(path, item_table=table, sem=None, vocabulary_digest="a", gap_seconds=600)
    content = path.read_bytes()
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(HandoffError, match=r"h\.safetensors"):
            load(path, num_items=2, embedding_dim=2, vocabulary_digest="a")


def test_a_truncated_file(saved):
    path = saved[0]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(HandoffError, match=r"handoff\.safetensors is damaged"):
        load(path)


def test_the_file_mode_follows_the_umask(tmp_path, table):
    path = tmp_path / "h.safetensors"
    before = os.umask(0o027)
    try:
        save_handoff(path, item_table=table, sem=None, vocabulary_digest="abc", gap_seconds=600)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


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
        ({"pooling": "mean"}, "pooling is 'cls' there, 'mean' here"),
        ({"max_sessions": 7}, "max_sessions is 128 there, 7 here"),
        ({"causal": True}, "causal is False there, True here"),
    ],
)
def test_a_sem_of_other_settings_is_left_untouched(saved, settings, message):
    sem = build_sem(**settings)
    before = {name: value.clone() for name, value in sem.state_dict().items()}
    with pytest.raises(HandoffError, match=message):
        load_sem_state(sem, load(saved[0]))
    assert all(torch.equal(sem.state_dict()[name], value) for name, value in before.items())


@pytest.mark.parametrize("causal", [False, True])
def test_an_undecided_sem_takes_the_form_of_the_handover(tmp_path, table, causal):
    path, sem = tmp_path / "h.safetensors", build_sem(causal=causal)
    save_handoff(path, item_table=table, sem=sem, vocabulary_digest="abc", gap_seconds=600)
    other = build_sem(causal=None)
    load_sem_state(other, load(path))
    assert other.causal is causal


def test_an_undecided_sem_is_not_handed_over(tmp_path, table):
    with pytest.raises(ValueError, match=r"sem\.causal is undecided"):
        save_handoff(
            tmp_path / "h.safetensors",
            item_table=table,
            sem=build_sem(causal=None),
            vocabulary_digest="abc",
            gap_seconds=600,
        )


def test_missing_sem_weights_leave_the_sem_untouched(saved):
    handoff = load(saved[0])
    del handoff.sem_state["gate"]
    sem = build_sem()
    before = {name: value.clone() for name, value in sem.state_dict().items()}
    with pytest.raises(HandoffError, match=r"gate is None there, \[8\] here"):
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
