"""Wrong gin files and bindings end in one line that names them, as on the command line.

`HPGR_BAD_CASES=10000` runs all of them; CI runs a random 100.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import bad_gin
import gin
import pytest
from small_run import Count

from hpgr_plugin.cli import USER_ERRORS, run_configured
from hpgr_plugin.errors import one_line
from hpgr_plugin.ops.dispatch import set_backends

NUMBER = int(os.environ.get("HPGR_BAD_CASES", "100"))


@pytest.fixture(autouse=True)
def _clear() -> Iterator[None]:
    yield
    gin.clear_config()
    set_backends(None)


def run(folder: Path, file: bytes | None, bindings: tuple[str, ...] = ()) -> str | None:
    """The one line that the command prints after "error: "; None where the run ends well.

    Anything that the command would print as a traceback is raised.
    """
    gin.clear_config()
    path = folder / "bad.gin"
    path.unlink(missing_ok=True)
    if file is not None:
        path.write_bytes(file)
    try:
        run_configured(str(path), list(bindings))
    except USER_ERRORS as error:
        return one_line(error)
    return None


@pytest.mark.parametrize("name", ["", *bad_gin.USES])
def test_the_right_configurations_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    bad_gin.write_sources(tmp_path)
    assert run(tmp_path, bad_gin.base(tmp_path, name).encode()) is None


def test_wrong_configurations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: Count
) -> None:
    monkeypatch.chdir(tmp_path)  # relative paths in bindings make folders
    wrong = []
    for case in bad_gin.cases(tmp_path)[:NUMBER]:
        traceback = unnamed = 0
        try:
            message = run(tmp_path, case.file, case.bindings)
        except (Exception, SystemExit) as error:
            traceback, message = 1, f"{type(error).__name__}: {error}"
        if message is None:
            unnamed = int(case.must_fail)
        elif not traceback:
            named = any(name in message for name in case.names)
            unnamed = int(not named or not message.isprintable())
        if traceback or unnamed:
            wrong.append((case.bindings or case.file, message))
        count(
            "gin",
            cases=1,
            tracebacks=traceback,
            errors_that_name_it=message is not None and not traceback and not unnamed,
            errors_that_do_not=unnamed,
            values_that_fit=message is None and not unnamed,
        )
    assert not wrong, "\n".join(map(str, wrong[:50]))


@pytest.mark.parametrize(
    ("binding", "words"),
    [
        ("hpgr.FinetuneSettings.learning_rate = -1.0", "learning_rate takes a number above 0"),
        ("hpgr.run.overwrite = 'no'", "hpgr.run.overwrite takes True or False, got 'no'"),
        ("hpgr.LastFractionSplit.test = 0.0", "hpgr.LastFractionSplit.test = 0.0"),
        ("hpgr.StochasticLength.alpha = 1.5", "hpgr.StochasticLength"),
        ("hpgr.HSTURanker.num_heads = 3", "embedding_dim must be a multiple of num_heads"),
        ("hpgr.HSTURanker.max_history = 5", "hpgr.RequestSettings.max_history = 64 is more than"),
        ("hpgr.run.seeds = [4294967296]", "hpgr.run.seeds takes integers of at most 4294967295"),
    ],
)
def test_what_a_message_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, binding: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    message = run(tmp_path, bad_gin.base(tmp_path).encode(), (binding,))
    assert message is not None
    assert words in message


@pytest.mark.parametrize(
    "path", ["none.gin", ".", "missing/none.gin", "x" * 300], ids=lambda path: path[:12]
)
def test_a_path_that_is_no_gin_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(USER_ERRORS) as caught:
        run_configured(path, [])
    assert path in one_line(caught.value)
