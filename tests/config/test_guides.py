"""The code blocks of docs/gin.md and docs/figures.md, and the gin of docs/slates.md."""

import re
from collections.abc import Iterator
from pathlib import Path

import gin
import pytest

from hpgr_plugin.cli import load_configs
from hpgr_plugin.config.scopes import check_scopes

DOCS = Path(__file__).parents[2] / "docs"
GUIDE = (DOCS / "gin.md").read_text() + (DOCS / "figures.md").read_text()
SLATES = (DOCS / "slates.md").read_text()


def blocks(language: str, text: str = GUIDE) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.fixture(autouse=True)
def _clear_gin() -> Iterator[None]:
    gin.clear_config()
    yield
    gin.clear_config()


@pytest.mark.parametrize("text", [*blocks("gin"), *blocks("gin", SLATES)])
def test_gin_blocks_are_valid(text: str) -> None:
    load_configs(["configs/models/hpgr_base.gin"], ["MAX_HISTORY = 9"])
    with gin.unlock_config():
        gin.parse_config(text)
    check_scopes()


@pytest.mark.parametrize("text", blocks("python"))
def test_python_blocks_run(text: str) -> None:
    names: dict = {}
    exec(text, names)
    assert names["model"].num_items == names["data"].log.num_items
