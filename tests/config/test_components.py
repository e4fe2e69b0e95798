"""Every component of the registry, and the one that docs/add_a_component.md adds."""

import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import gin
import pytest
from component_cases import CHECKS, Variant, make_batch, variants_of

from hpgr_plugin.config import registry
from hpgr_plugin.config.registry import GROUPS, HOOK, Entry, configured, register_entry

GUIDE = Path(__file__).parents[2] / "docs" / "add_a_component.md"
ENTRIES = [e for group in ("components", "embedded") for e in GROUPS[group] if e.slot is not None]
CASES = [variant for entry in ENTRIES for variant in variants_of(entry)]


def name_of(case: object) -> str | None:
    return case.name if isinstance(case, Variant) else None


@pytest.fixture(autouse=True)
def _clear_gin() -> Iterator[None]:
    yield
    gin.clear_config()


@pytest.mark.parametrize("case", CASES, ids=name_of)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_component(check: Callable[..., None], case: Variant) -> None:
    check(case)


def block(language: str) -> str:
    """The first code block of this language in the guide."""
    found = re.search(rf"```{language}\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert found is not None
    return found[1]


@pytest.fixture
def added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Entry:
    """The guide's component, registered by the guide's line."""
    line = re.search(r"^    (Entry\(.*\)),$", GUIDE.read_text(), re.MULTILINE)
    assert line is not None
    entry = eval(line[1], {"Entry": Entry, "HOOK": HOOK})
    file = tmp_path / "guide.py"
    file.write_text(block("python"))
    module = entry.target.partition(":")[0]
    spec = importlib.util.spec_from_file_location(module, file)
    assert spec is not None
    assert spec.loader is not None
    monkeypatch.setitem(sys.modules, module, importlib.util.module_from_spec(spec))
    spec.loader.exec_module(sys.modules[module])
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    gin.enter_interactive_mode()  # each test loads the module anew
    register_entry(entry)
    gin.exit_interactive_mode()
    return entry


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_component_of_the_guide(check: Callable[..., None], added: Entry) -> None:
    check(Variant(added))


def test_the_guide_binds_its_component_in_gin(added: Entry) -> None:
    registry.register("components", "data", "embedded")
    gin.parse_config(block("gin"))
    model = configured("HSTURanker")(num_items=40, num_actions=5, vocabulary_digest="")
    assert type(model.attention_hook).__name__ == added.name
    assert model.attention_hook.hours == 6.0
    assert model(make_batch()).shape == (12,)


def test_the_guide_is_short() -> None:
    assert len(block("python").splitlines()) <= 45
