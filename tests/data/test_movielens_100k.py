"""Fetching MovieLens-100K from a copy: verified, whole or not at all."""

from pathlib import Path

import pytest

from hpgr_plugin.data import DataError, movielens_100k


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A copy whose checksums count as the right ones."""
    source = tmp_path / "source"
    source.mkdir()
    ratings = movielens_100k._HEADER + b"1\t2\t3\t4\n"
    (source / "ml-100k.inter").write_bytes(ratings)
    (source / "ml-100k.user").write_bytes(b"users")
    digests = {
        "ml-100k.inter": movielens_100k.file_digest(source / "ml-100k.inter"),
        "ml-100k.user": movielens_100k.file_digest(source / "ml-100k.user"),
        "ml-100k.item": "0" * 64,
    }
    monkeypatch.setattr(movielens_100k, "SHA256", digests)
    return source


def test_copies_and_then_has_nothing_to_do(
    known: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "deep" / "ml-100k"
    movielens_100k.fetch(out, known)
    assert sorted(path.name for path in out.iterdir()) == ["ml-100k.inter", "ml-100k.user"]
    movielens_100k.fetch(out, tmp_path / "nowhere")
    assert "already there" in capsys.readouterr().out


def test_takes_the_original_file(known: Path, tmp_path: Path) -> None:
    original = tmp_path / "original"
    original.mkdir()
    (original / "u.data").write_bytes(b"1\t2\t3\t4\n")
    out = movielens_100k.fetch(tmp_path / "out", original / "u.data")
    assert (out / "ml-100k.inter").read_bytes() == (known / "ml-100k.inter").read_bytes()


def test_a_wrong_checksum_leaves_nothing(known: Path, tmp_path: Path) -> None:
    (known / "ml-100k.user").write_bytes(b"other users")
    with pytest.raises(DataError, match="sha256"):
        movielens_100k.fetch(tmp_path / "out", known)
    assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_changed_file_is_not_taken_for_good(known: Path, tmp_path: Path) -> None:
    out = movielens_100k.fetch(tmp_path / "out", known)
    (out / "ml-100k.inter").write_bytes(b"cut")
    with pytest.raises(DataError, match="delete"):
        movielens_100k.fetch(out, known)


def test_a_folder_without_the_data(known: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"neither ml-100k\.inter nor u\.data"):
        movielens_100k.fetch(tmp_path / "out", tmp_path / "empty")
