"""The code in docs/concepts.md runs and prints what its comments say."""

import re
import textwrap
from pathlib import Path

CONCEPTS = Path(__file__).parents[1] / "docs" / "concepts.md"


def test_the_plan_of_the_concepts_page(capsys):
    block = re.search(r"((?:    import torch\n)(?:(?:    .*)?\n)+)", CONCEPTS.read_text())
    assert block is not None
    code = textwrap.dedent(block.group(1))
    exec(compile(code, str(CONCEPTS), "exec"), {})
    wanted = re.findall(r"print\(.*# (\[.*?\])", code)
    assert len(wanted) == 2
    assert capsys.readouterr().out.splitlines() == wanted
