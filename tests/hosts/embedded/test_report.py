"""The ablation's table."""

from hpgr_plugin.hosts.embedded.report.table import markdown_table, mean_and_spread


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
