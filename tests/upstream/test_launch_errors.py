"""Both launchers end in one line and exit code 2 for what a user can get wrong."""

from pathlib import Path

import pytest
from generative_recommenders.research.trainer import train as host_train

from hpgr_plugin.hosts.dlrm_v3 import launch as ranking
from hpgr_plugin.hosts.research import launch as retrieval

pytestmark = pytest.mark.upstream

ROOT = Path(__file__).parents[2]
CONFIGS = {name: f"configs/upstream/{name}_synthetic.gin" for name in ("ranking", "retrieval")}


def ends_in_one_line(
    capfd: pytest.CaptureFixture[str], name: str, *flags: str, config: str | None = None
) -> str:
    """Run a launcher in this process, its one worker too; the line that it printed."""
    main = {"ranking": ranking.main, "retrieval": retrieval.main}[name]
    with pytest.raises(SystemExit) as ended:
        main([f"--gin_config_file={config or CONFIGS[name]}", *flags])
    assert ended.value.code == 2
    printed = capfd.readouterr().err
    assert "Traceback" not in printed
    return next(line for line in reversed(printed.splitlines()) if "error: " in line)


@pytest.fixture(autouse=True)
def _one_worker_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(worker, count, *arguments):  # type: ignore[no-untyped-def]
        worker(0, 1, *arguments)

    monkeypatch.setattr(ranking, "start_workers", run)
    monkeypatch.setattr(ranking, "start_gloo", lambda *_: None)
    monkeypatch.setattr(ranking.train, "setup", lambda **_: None)
    monkeypatch.setattr(ranking.train, "cleanup", lambda: None)
    monkeypatch.setattr(retrieval.launch, "start_workers", run)
    monkeypatch.setattr(retrieval.launch, "start_gloo", lambda *_: None)
    monkeypatch.setattr(host_train, "setup", lambda *_: None)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_missing_file_is_named(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert "nowhere.gin" in ends_in_one_line(capfd, name, config="nowhere.gin")


@pytest.mark.parametrize(
    ("name", "model"), [("ranking", "DlrmHSTU"), ("retrieval", "SequentialEncoder")]
)
def test_a_misspelt_slot_is_named(name: str, model: str, capfd: pytest.CaptureFixture[str]) -> None:
    line = ends_in_one_line(capfd, name, f"--gin_bindings=hpgr.{model}.semm = None")
    assert "semm" in line


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ("sem = 5", "hpgr.DlrmHSTU.sem takes @hpgr.SessionEnhancementModule() or None, got"),
        ("pretrained = 'gone.safetensors'", "gone.safetensors"),
        ("inherited_lr_ratio = 3", "inherited_lr_ratio must be in [0, 1], got 3"),
    ],
)
def test_an_unfit_slot_of_the_ranking_trainer_is_named(
    binding: str, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    line = ends_in_one_line(
        capfd, "ranking", "--device=cpu", f"--gin_bindings=hpgr.DlrmHSTU.{binding}"
    )
    assert message in line


def test_a_wrong_width_names_both(capfd: pytest.CaptureFixture[str]) -> None:
    flags = ("--device=cpu", "--gin_bindings=hpgr.SessionEnhancementModule.embedding_dim = 8")
    line = ends_in_one_line(capfd, "ranking", *flags)
    assert "hpgr.DlrmHSTU.sem must have the width of the item table: embedding_dim=32" in line


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ("SequentialEncoder.sem = 5", "hpgr.SequentialEncoder.sem takes "),
        ("SequentialEncoder.attention_hook = @hpgr.PreferenceGuidedSparseAttention()", "must stay"),
        ("SessionEnhancementModule.embedding_dim = 8", "embedding_dim=32, got embedding_dim=8"),
        ("SequentialEncoder.pretrained = 'gone.safetensors'", "gone.safetensors"),
    ],
)
def test_an_unfit_slot_of_the_retrieval_trainer_is_named(
    binding: str,
    message: str,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "upstream"))
    import retrieval_data

    retrieval_data.write(tmp_path, users=4)
    monkeypatch.chdir(tmp_path)
    line = ends_in_one_line(
        capfd,
        "retrieval",
        "--gin_bindings=hpgr.SequentialEncoder.pretrained = None",
        f"--gin_bindings=hpgr.{binding}",
    )
    assert message in line
