"""The code in README.md and docs/concepts.md runs and prints what its comments say."""

import re
import textwrap
from pathlib import Path

import gin

from hpgr_plugin.config import registry
from hpgr_plugin.config.bindings import check_types, check_unused

ROOT = Path(__file__).parents[1]
CONCEPTS = ROOT / "docs" / "concepts.md"
README = ROOT / "README.md"


def test_the_plan_of_the_concepts_page(capsys):
    block = re.search(r"((?:    import torch\n)(?:(?:    .*)?\n)+)", CONCEPTS.read_text())
    assert block is not None
    code = textwrap.dedent(block.group(1))
    exec(compile(code, str(CONCEPTS), "exec"), {})
    wanted = re.findall(r"print\(.*# (\[.*?\])", code)
    assert len(wanted) == 2
    assert capsys.readouterr().out.splitlines() == wanted


def test_the_python_of_the_readme(capsys):
    code = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[1]
    exec(compile(code, str(README), "exec"), {})
    first, second = capsys.readouterr().out.splitlines()
    assert first == re.search(r"# (tensor\(.*\))", code)[1]
    assert second.startswith("tensor([0, ")


def test_the_gin_of_the_readme():
    """Without a host: the slots of the ranking trainer are bound to what they take."""
    snippet = r"    (import hpgr_plugin.hosts.dlrm_v3\n.*?)\n\n[^ \n]"
    block = re.search(snippet, README.read_text(), re.DOTALL)
    lines = textwrap.dedent("    " + block[1]).replace("import hpgr_plugin.hosts.dlrm_v3", "")
    registry.register("components", "data", "embedded")
    try:
        gin.parse_config(lines.replace("hpgr.DlrmHSTU", "hpgr.HSTURanker"))
        check_types()
        check_unused()
    finally:
        gin.clear_config()


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 130
