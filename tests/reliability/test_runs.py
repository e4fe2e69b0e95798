"""Runs that are repeated, interrupted, damaged or started twice."""

import json
from pathlib import Path

import pytest
from small_run import error_lines, kill, results, run, run_with_file_limit, start, write_config


def one_error(code: int, errors: str, *words: str) -> None:
    """One line, exit code 2, no traceback, and the words in it."""
    assert code == 2, errors
    assert "Traceback" not in errors
    (line,) = error_lines(errors)
    for word in words:
        assert word in line, line


def test_a_finished_run_is_left_as_it_is_unless_told(whole: Path) -> None:
    before = (whole / "out" / "results.json").read_bytes()
    code, errors = run(write_config(whole))
    assert code == 0
    assert "nothing to do" in errors
    assert (whole / "out" / "results.json").read_bytes() == before
    code, errors = run(write_config(whole), "--gin_bindings=hpgr.run.overwrite = True")
    assert code == 0, errors
    assert results(whole)["auc"] == json.loads(before)["metrics"]["auc"]


def test_other_settings_do_not_continue_a_run(whole: Path) -> None:
    before = (whole / "out" / "results.json").read_bytes()
    config = write_config(whole, "hpgr.FinetuneSettings.learning_rate = 0.5")
    one_error(
        *run(config), "learning_rate was not bound, is 0.5", "hpgr.run.overwrite = True", str(whole)
    )
    config = write_config(whole, "hpgr.FinetuneSettings.learning_rate = 0.5")
    one_error(*run(config, module="evaluate"), "learning_rate was not bound, is 0.5")
    one_error(*run(write_config(whole, "SEED = 7")), "the data was")
    assert (whole / "out" / "results.json").read_bytes() == before


def test_an_evaluation_gives_the_metrics_of_the_training(whole: Path) -> None:
    code, errors = run(write_config(whole), module="evaluate")
    assert code == 0, errors
    assert results(whole, "evaluation.json")["auc"] == results(whole)["auc"]


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2))])
def test_early_stopping_inside_an_epoch_can_be_evaluated(tmp_path: Path, seed: int) -> None:
    stops = (
        f"hpgr.run.seeds = [{seed}]",
        "hpgr.FinetuneSettings.evaluations_per_epoch = 5",
        "hpgr.FinetuneSettings.patience = 1",
        "hpgr.FinetuneSettings.learning_rate = 0.1",
        "hpgr.FinetuneSettings.checkpoint_every = 0",
    )
    assert run(write_config(tmp_path, *stops))[0] == 0
    code, errors = run(write_config(tmp_path, *stops), module="evaluate")
    assert code == 0, errors
    assert results(tmp_path, "evaluation.json")["auc"] == results(tmp_path)["auc"]


def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    long = ("hpgr.FinetuneSettings.epochs = 400", "hpgr.FinetuneSettings.patience = 400")
    config = write_config(tmp_path, *long)
    first = start(config)
    try:
        while not (tmp_path / "out" / "run.json").exists():
            assert first.poll() is None
        one_error(*run(config), "is in use by another run", "hpgr.run.output_dir")
    finally:
        kill(first)


@pytest.mark.parametrize(
    "limit",
    [20_000, *(pytest.param(n, marks=pytest.mark.slow) for n in (2_000, 100_000, 300_000))],
)
def test_a_full_disk_loses_nothing(tmp_path: Path, limit: int, whole: Path) -> None:
    config = write_config(tmp_path)
    code, errors = run_with_file_limit(config, limit)
    if code != 0:
        assert "Traceback" not in errors
        assert error_lines(errors)
    code, errors = run(config)
    assert code == 0, errors
    assert results(tmp_path) == results(whole)


def damaged(path: Path, how: str) -> bytes:
    content = bytearray(path.read_bytes())
    if how == "empty":
        return b""
    if how == "truncated":
        return bytes(content[: len(content) // 2])
    if how == "text":
        return b"not a checkpoint\n"
    content[len(content) // 2] ^= 0x10
    return bytes(content)


@pytest.mark.parametrize("how", ["empty", "truncated", "text", "flipped bit"])
def test_a_damaged_checkpoint_names_the_file(whole: Path, how: str) -> None:
    path = whole / "out" / "checkpoint.pt"
    good = path.read_bytes()
    try:
        path.write_bytes(damaged(path, how))
        one_error(*run(write_config(whole), module="evaluate"), "checkpoint.pt", "damaged")
    finally:
        path.write_bytes(good)


def test_a_checkpoint_of_the_other_stage(whole: Path, tmp_path: Path) -> None:
    assert run(write_config(tmp_path, mode="pretrain"))[0] == 0
    (tmp_path / "out" / "run.json").write_bytes((whole / "out" / "run.json").read_bytes())
    one_error(*run(write_config(tmp_path), module="evaluate"), "checkpoint.pt", "another model")


@pytest.mark.parametrize(
    ("binding", "words"),
    [
        ("hpgr.FinetuneSettings.clip_norm = 0.0", ["clip_norm takes a number above 0, got 0.0"]),
        ("hpgr.HSTURanker.sem = @a/hpgr.SessionEnhancementModule()", ["scope 'a'"]),
        ("hpgr.HSTURanker.pretrained = 'none.safetensors'", ["none.safetensors"]),
    ],
)
def test_a_setting_that_cannot_work_is_one_line(
    tmp_path: Path, binding: str, words: list[str]
) -> None:
    one_error(*run(write_config(tmp_path, binding)), *words)
