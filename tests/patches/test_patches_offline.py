"""The patch series and its tool, without the host: rules of the files, and a toy checkout."""

import re
import subprocess
from pathlib import Path

import pytest

from hpgr_plugin.patches import State, load_series
from hpgr_plugin.patches.__main__ import main
from hpgr_plugin.patches.checkout import PatchError, apply, blob_id, check, revert
from hpgr_plugin.patches.series import SERIES_FOLDER, Series, file_changes

TOY = "one\ntwo\nthree\n"
TOY_PATCHED = "one\nadded\ntwo\nthree\nlast\n"


def test_patches_add_lines_and_carry_nothing_else() -> None:
    hunk = re.compile(r"^@@ -\d+,0 \+\d+(,\d+)? @@$")
    for patch in load_series().patches:
        diff = patch.read_text().split("\ndiff --git ", 1)[1]
        for line in diff.splitlines()[1:]:
            allowed = (
                line.startswith(("diff --git ", "index ", "--- a/", "+++ b/"))
                or (line.startswith("+") and not line.startswith("+++"))
                or hunk.match(line)
            )
            assert allowed, f"{patch.name}: {line}"


def test_every_patch_says_what_it_is() -> None:
    for patch in load_series().patches:
        head = patch.read_text().split("diff --git ", 1)[0]
        assert head.startswith("Subject: ")
        assert len(head.splitlines()) >= 3, patch.name


def test_series_is_numbered_without_gaps_and_listed_in_the_readme() -> None:
    names = [patch.stem for patch in load_series().patches]
    assert [int(name[:4]) for name in names] == list(range(1, len(names) + 1))
    readme = (SERIES_FOLDER / "README.md").read_text()
    for name in names:
        assert f"| {name.replace('-', ' ', 1)} |" in readme, name


def test_file_changes_demands_full_blob_ids() -> None:
    lines = ["diff --git a/x.py b/x.py", "index 1234567..89abcde 100644", "--- a/x.py"]
    with pytest.raises(ValueError, match=r"full blob ids for x\.py"):
        file_changes(lines)
    with pytest.raises(ValueError, match="in place"):
        file_changes(["diff --git a/x.py b/y.py"])


def test_load_series_demands_patches_that_follow_each_other(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no numbered patches"):
        load_series(tmp_path)
    for number, before, after in ((1, "a" * 40, "b" * 40), (2, "c" * 40, "d" * 40)):
        text = f"diff --git a/x.py b/x.py\nindex {before}..{after} 100644\n"
        (tmp_path / f"000{number}-x.patch").write_text(text)
    with pytest.raises(ValueError, match=r"0002-x\.patch starts from c"):
        load_series(tmp_path)


@pytest.fixture
def toy(tmp_path: Path) -> tuple[Path, Series]:
    """A checkout of one file, inside an unrelated repository, and a series for it."""
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    host = tmp_path / "vendored" / "host"
    (host / "package").mkdir(parents=True)
    file = host / "package" / "file.py"
    file.write_bytes(TOY_PATCHED.encode())
    after = blob_id(file)
    file.write_bytes(TOY.encode())
    folder = tmp_path / "series"
    folder.mkdir()
    (folder / "0001-toy.patch").write_text(
        "Subject: toy\n\n"
        "diff --git a/package/file.py b/package/file.py\n"
        f"index {blob_id(file)}..{after} 100644\n"
        "--- a/package/file.py\n+++ b/package/file.py\n"
        "@@ -1,0 +2 @@\n+added\n@@ -3,0 +5 @@\n+last\n"
    )
    return host, load_series(folder)


def test_blob_id_is_git_s(toy: tuple[Path, Series]) -> None:
    host, _ = toy
    file = host / "package" / "file.py"
    answer = subprocess.run(["git", "hash-object", str(file)], capture_output=True, text=True)
    assert blob_id(file) == answer.stdout.strip()
    assert blob_id(host / "absent") is None


def test_apply_and_revert_outside_a_repository_of_its_own(toy: tuple[Path, Series]) -> None:
    host, series = toy
    file = host / "package" / "file.py"
    assert check(host, series) is State.CLEAN
    apply(host, series)
    assert file.read_bytes() == TOY_PATCHED.encode()
    assert check(host, series) is State.APPLIED
    with pytest.raises(PatchError, match="applied already"):
        apply(host, series)
    revert(host, series)
    assert file.read_bytes() == TOY.encode()
    with pytest.raises(PatchError, match="not applied"):
        revert(host, series)


@pytest.mark.parametrize("content", [TOY + "edited\n", TOY.replace("\n", "\r\n"), None])
def test_another_version_is_refused_untouched(
    toy: tuple[Path, Series], content: str | None
) -> None:
    host, series = toy
    file = host / "package" / "file.py"
    file.unlink()
    if content is not None:
        file.write_bytes(content.encode())
    for command in (check, apply, revert):
        with pytest.raises(PatchError, match=r"package/file\.py"):
            command(host, series)
    assert file.exists() == (content is not None)
    if content is not None:
        assert file.read_bytes() == content.encode()


def test_wrong_outcome_is_put_back(toy: tuple[Path, Series]) -> None:
    host, series = toy
    file = host / "package" / "file.py"
    patch = series.patches[0]
    patch.write_text(patch.read_text().replace("+last", "+other"))
    with pytest.raises(PatchError, match="other content"):
        apply(host, series)
    assert file.read_bytes() == TOY.encode()


def test_command_line(toy: tuple[Path, Series], capsys: pytest.CaptureFixture[str]) -> None:
    host, series = toy
    rest = [str(host), "--series", str(series.patches[0].parent)]
    assert [main([command, *rest]) for command in ("check", "apply", "check", "apply")] == [
        0,
        0,
        0,
        1,
    ]
    assert "applied already" in capsys.readouterr().err
    assert main(["revert", *rest]) == 0
    assert main(["check", str(host), "--series", str(host)]) == 1
    assert "no numbered patches" in capsys.readouterr().err
