"""The ablation's table."""

from hpgr_plugin.hosts.embedded.report.table import (
    comparison_note,
    markdown_table,
    mean_and_spread,
)


def test_the_table_shows_mean_and_spread() -> None:
    rows = [
        {"title": "baseline", "seeds": [{"auc": 0.5}]},
        {"title": "model", "seeds": [{"auc": 0.7, "seconds_per_step": 0.25}, {"auc": 0.8}]},
    ]
    lines = [
        [cell.strip() for cell in line.split("|")] for line in markdown_table(rows).split("\n")
    ]
    assert lines[0][1:-1] == ["model", "AUC", "s/step"]
    assert lines[2][1:-1] == ["baseline", "0.5000", "-"]
    assert lines[3][1:-1] == ["model", "0.7500 ± 0.0707", "0.2500"]


def test_the_spread_of_one_value_is_zero() -> None:
    assert mean_and_spread([0.3]) == (0.3, 0.0)


def test_differences_are_columns_with_a_note() -> None:
    interval = {"value": 0.01, "low": -0.002, "high": 0.022}
    rows = [
        {"scope": "rival", "title": "the rival", "seeds": [{"auc": 0.7}]},
        {
            "scope": "ours",
            "title": "ours",
            "seeds": [{"auc": 0.71}],
            "difference": {"from": "rival", "auc": interval, "gauc": interval},
        },
    ]
    lines = [line.split("|") for line in markdown_table(rows).split("\n")]
    assert "AUC - best rival [95%]" in lines[0][3]
    assert lines[2][3].strip() == "-"
    assert lines[3][3].strip() == "+0.0100 [-0.0020, +0.0220]"
    assert "from the best rival, the rival" in " ".join(comparison_note(rows))
    assert comparison_note(rows[:1]) == []
