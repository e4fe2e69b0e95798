"""The contract against the host on the path: known commits pass, a moved host is named."""

import importlib
import sys
from pathlib import Path

import pytest

from hpgr_plugin.hosts import contract
from hpgr_plugin.hosts.contract import HostContractError
from hpgr_plugin.hosts.requirements import DLRM_V3, Requirement

pytestmark = pytest.mark.upstream


def test_the_host_has_all_that_the_ranking_adapter_relies_on() -> None:
    assert contract.check(DLRM_V3) == []
    dlrm_v3 = importlib.import_module("hpgr_plugin.hosts.dlrm_v3")
    dlrm_v3.detach()
    assert contract.check(DLRM_V3) == []
    dlrm_v3.attach()
    assert contract.check(DLRM_V3) == []


def test_the_host_is_a_known_commit_or_known_to_be_edited() -> None:
    version = contract.host_version()
    assert version.root is not None
    assert (version.root / "generative_recommenders").is_dir()
    if version.source == "files":
        assert version.commit in contract.KNOWN_COMMITS


def test_everything_missing_is_listed_at_once_with_the_commits_that_work() -> None:
    stu = "generative_recommenders.modules.stu"
    moved = (
        Requirement("generative_recommenders.modules.gone", "Anything"),
        Requirement(stu, "STULayer.sideways"),
        Requirement(stu, "STULayer", ("config", "is_training")),
        Requirement(stu, "STULayer"),
    )
    with pytest.raises(HostContractError) as raised:
        contract.require("hpgr_plugin.hosts.test", moved)
    assert len(raised.value.problems) == 3
    message = str(raised.value)
    for part in (
        "modules.gone: does not import",
        "STULayer.sideways: not there",
        "takes no parameter is_training",
        *contract.KNOWN_COMMITS,
    ):
        assert part in message


def test_an_adapter_on_a_moved_host_says_so_at_import(monkeypatch: pytest.MonkeyPatch) -> None:
    from generative_recommenders.modules import dlrm_hstu

    monkeypatch.delattr(dlrm_hstu.DlrmHSTU, "main_forward")
    loaded = {
        name: m for name, m in sys.modules.items() if name.startswith("hpgr_plugin.hosts.dlrm_v3")
    }
    for name in loaded:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(HostContractError, match=r"DlrmHSTU\.main_forward: not there"):
        importlib.import_module("hpgr_plugin.hosts.dlrm_v3")


def test_a_copy_without_git_is_recognised_by_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = contract.host_version()
    if version.source != "files":
        pytest.skip("the host's files are not those of a known commit")
    assert version.root is not None
    copied = tmp_path / "generative_recommenders"
    for path in contract.KNOWN_COMMITS[str(version.commit)]:
        (copied / path).parent.mkdir(parents=True, exist_ok=True)
        (copied / path).write_bytes((version.root / "generative_recommenders" / path).read_bytes())
    monkeypatch.setattr(contract, "_host_root", lambda: tmp_path)
    assert contract.host_version() == contract.HostVersion(tmp_path, version.commit, "files")
    (copied / path).write_text("edited")
    assert contract.host_version() == contract.HostVersion(tmp_path, None, "unknown")
