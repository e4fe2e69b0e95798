"""What the tests of this folder count, shown at the end of a test run."""

from collections import Counter
from pathlib import Path

import pytest
from small_run import Count, run, write_config

COUNTS: dict[str, Counter[str]] = {}


@pytest.fixture
def count() -> Count:
    """`count("heading", cases=1, tracebacks=0)`: adds to the counts of a line of the summary."""

    def add(heading: str, **numbers: int) -> None:
        COUNTS.setdefault(heading, Counter()).update(numbers)

    return add


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, to compare with and to damage copies of."""
    folder = tmp_path_factory.mktemp("whole")
    code, errors = run(write_config(folder))
    assert code == 0, errors
    return folder


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line per heading."""
    if COUNTS:
        terminalreporter.section("reliability")
    for heading, counts in COUNTS.items():
        numbers = ", ".join(f"{number} {name.replace('_', ' ')}" for name, number in counts.items())
        terminalreporter.write_line(f"{heading}: {numbers}")
