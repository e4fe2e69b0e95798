"""The patch series on real checkouts, and what it leaves of the host's behaviour.

The tests of the seams themselves are in `test_patch_seams.py`: they run on a patched host, and from
here in a process of their own.
"""

import os
import subprocess
import sys
import tarfile
from io import BytesIO
from pathlib import Path

import pytest

from hpgr_plugin.hosts.contract import HOST_PACKAGE, KNOWN_COMMITS, host_version
from hpgr_plugin.patches import PatchError, State, apply, check, load_series, revert
from hpgr_plugin.patches.series import HOST_COMMIT

pytestmark = pytest.mark.upstream

HERE = Path(__file__).parent
PROJECT = HERE.parents[1]
ON_PATCHED = ("test_patch_seams.py", "test_research*.py", "test_dlrm_v3_*.py")
OTHERS = [commit for commit in KNOWN_COMMITS if commit != HOST_COMMIT]


def export(commit: str, folder: Path) -> Path:
    """The files of a commit, without a repository around them."""
    root = host_version().root
    packed = subprocess.run(
        ["git", "-C", str(root), "archive", commit, "main.py", "configs", HOST_PACKAGE],
        capture_output=True,
    )
    if packed.returncode:
        pytest.skip(f"the host on the path is no git checkout that has commit {commit}")
    with tarfile.open(fileobj=BytesIO(packed.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return folder


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def host(tmp_path: Path) -> Path:
    return export(HOST_COMMIT, tmp_path / "host")


@pytest.fixture
def patched(host: Path) -> Path:
    apply(host)
    return host


def run(host: Path, *command: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A Python command with `host` on the path and without a GPU."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(host), str(PROJECT)]),
        "CUDA_VISIBLE_DEVICES": "",
    }
    return subprocess.run(
        [sys.executable, "-W", "ignore", *command],
        cwd=cwd or PROJECT,
        env=environment,
        capture_output=True,
        text=True,
    )


def test_apply_changes_the_named_files_and_revert_brings_every_byte_back(host: Path) -> None:
    before = contents(host)
    assert check(host) is State.CLEAN
    apply(host)
    assert check(host) is State.APPLIED
    after = contents(host)
    changed = {str(path.relative_to(host)) for path in after if after[path] != before[path]}
    assert changed == set(load_series().before)
    revert(host)
    assert contents(host) == before


def test_git_alone_applies_the_series_too(host: Path, tmp_path: Path) -> None:
    patches = [str(patch) for patch in load_series().patches]
    subprocess.run(["git", "init", "-q", str(host)], check=True)
    subprocess.run(["git", "apply", "--unidiff-zero", *patches], check=True, cwd=host)
    assert check(host) is State.APPLIED


@pytest.mark.parametrize("commit", OTHERS)
def test_another_commit_is_refused_untouched(tmp_path: Path, commit: str) -> None:
    other = export(commit, tmp_path / "other")
    before = contents(other)
    for operation in (check, apply, revert):
        with pytest.raises(PatchError, match=f"not the host's commit {HOST_COMMIT}"):
            operation(other)
    assert contents(other) == before


def test_a_patch_carries_no_line_of_the_host(host: Path) -> None:
    """Only lines of some length count; `else:` and `)` occur in any file."""
    series = load_series()
    lines = {
        line.strip() for path in series.before for line in (host / path).read_text().splitlines()
    }
    for patch in series.patches:
        added = [
            line[1:].strip()
            for line in patch.read_text().splitlines()
            if line.startswith("+") and not line.startswith("+++")
        ]
        shared = {line for line in added if line in lines and len(line) > 30}
        assert not shared, patch.name


@pytest.mark.slow
def test_seams_and_adapters_on_a_patched_host(patched: Path) -> None:
    files = [file.name for pattern in ON_PATCHED for file in HERE.glob(pattern)]
    done = run(patched, "-m", "pytest", "-q", "-rs", *(str(HERE / file) for file in files))
    assert done.returncode == 0, done.stdout
    assert "SKIPPED" not in done.stdout, done.stdout


@pytest.mark.slow
def test_main_py_trains_on_the_cpu(patched: Path, tmp_path: Path) -> None:
    """The host's own entry point, with the example's .gin file, both untouched."""
    config = str(PROJECT / "configs" / "upstream" / "retrieval_synthetic.gin")
    data = str(PROJECT / "examples" / "upstream" / "retrieval_data.py")
    stage_1 = ("-m", "hpgr_plugin.hosts.research", "--mode=pretrain")
    for command in (
        (data, str(tmp_path), "--users=24"),
        (*stage_1, f"--gin_config_file={config}"),
        (str(patched / "main.py"), f"--gin_config_file={config}", "--master_port=12395"),
    ):
        done = run(patched, *command, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert list((tmp_path / "ckpts").rglob("*_ep2"))


@pytest.mark.slow
def test_train_ranker_trains_on_the_cpu_from_any_gin_file(patched: Path, tmp_path: Path) -> None:
    config = str(PROJECT / "configs" / "upstream" / "ranking_synthetic.gin")
    data = str(PROJECT / "examples" / "upstream" / "ranking_data.py")
    few = tmp_path / "few.gin"
    few.write_text(f'include "{config}"\ntrain_loop.num_epochs = 1\ntrain_loop.num_batches = 4\n')
    trainer = ("-m", f"{HOST_PACKAGE}.dlrm_v3.train.train_ranker", "--mode=train")
    for command in (
        (data, "--out", str(tmp_path / "tmp"), "--num_users=200"),
        (*trainer, f"--gin_file={few}"),
    ):
        done = run(patched, *command, cwd=tmp_path)
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_host_s_own_tests_give_what_they_gave(host: Path) -> None:
    before = own_tests(host)
    apply(host)
    assert own_tests(host) == before
    assert sum(outcome == "PASSED" for outcome in before.values()) >= 6


def own_tests(host: Path) -> dict[str, str]:
    """Outcome of each of the host's tests, or of the collection of its file."""
    done = run(
        host,
        *("-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", "--rootdir", str(host)),
        *("--continue-on-collection-errors", HOST_PACKAGE),
        cwd=host,
    )
    outcomes: dict[str, str] = {}
    for line in done.stdout.splitlines():
        outcome, _, rest = line.partition(" ")
        if outcome in ("PASSED", "FAILED", "ERROR"):
            outcomes[rest.split(" ")[0]] = outcome
        elif outcome == "SKIPPED":
            place, _, reason = rest.partition(": ")
            # The line number moves with added lines; the file and the reason do not.
            key = f"{place.rsplit(':', 1)[0]} {reason}"
            outcomes[key] = "SKIPPED"
    return outcomes
