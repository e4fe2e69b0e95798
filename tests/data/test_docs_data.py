"""The gin lines of docs/data.md prepare a log."""

import textwrap
from pathlib import Path

import gin
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hpgr_plugin.config import registry

DOCS = Path(__file__).parents[2] / "docs" / "data.md"


def test_your_own_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = DOCS.read_text().partition("## Your own log")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("    ") or not line]
    table = pa.table(
        {
            "member_id": ["a", "a", "b"] * 10,
            "video_id": list(range(30)),
            "shown_at": [1_700_000_000_000 + 1000 * row for row in range(30)],
            "watch_seconds": [3, 30, 12] * 10,
        }
    )
    pq.write_table(table, tmp_path / "events.parquet")
    monkeypatch.chdir(tmp_path)
    registry.register("data", "components", "embedded")
    gin.clear_config()
    try:
        gin.parse_config(textwrap.dedent("\n".join(lines)))
        log = registry.build("prepare_data").log
    finally:
        gin.clear_config()
    assert log.user_ids.tolist() == ["a", "b"]
    assert log.timestamp.min() == 1_700_000_000
    assert log.label.mean() == pytest.approx(2 / 3)
