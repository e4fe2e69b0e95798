"""Small right files of every kind of source, for runs that something else is wrong with."""

import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

USERS, EVENTS = 8, 16


def write_sources(folder: Path) -> None:
    """`table.csv`, and the folders `movielens`, `kuairand`, `ebnerd` and `yambda`."""
    rows = [
        (user, (user + n) % 20, 10**9 + 60 * n, n % 2)
        for user in range(USERS)
        for n in range(EVENTS)
    ]
    for name in ("movielens", "kuairand", "ebnerd", "yambda"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    _write(
        folder / "table.csv",
        ["user_id,item_id,timestamp,label", *(f"{u},{i},{t},{y}" for u, i, t, y in rows)],
    )
    _write(
        folder / "movielens" / "u.data",
        [f"{user}\t{item}\t{4 * label + 1}\t{time}" for user, item, time, label in rows],
    )
    _write(
        folder / "kuairand" / "log_standard_1.csv",
        [
            "user_id,video_id,date,time_ms,is_click,tab",
            *(
                f"{user},{item},20220425,{1000 * time},{label},1"
                for user, item, time, label in rows
            ),
        ],
    )
    _write_ebnerd(folder / "ebnerd")
    users, items, times, labels = zip(*rows, strict=True)
    columns = {
        "uid": users,
        "item_id": items,
        "timestamp": times,
        "is_organic": [1] * len(rows),
        "played_ratio_pct": [100 * label for label in labels],
    }
    for name in ("listens", "likes", "dislikes"):
        pq.write_table(pa.table(columns), folder / "yambda" / f"{name}.parquet")


def _write_ebnerd(folder: Path) -> None:
    start = datetime.datetime(2023, 5, 18)
    lists = pa.large_list(pa.int32())
    times = pa.large_list(pa.timestamp("us"))
    numbers = range(USERS * EVENTS)
    shown = {
        "impression_id": list(numbers),
        "impression_time": pa.array(
            [start + datetime.timedelta(minutes=n) for n in numbers], pa.timestamp("us")
        ),
        "article_ids_inview": pa.array([[n % 5, 5 + n % 5] for n in numbers], lists),
        "article_ids_clicked": pa.array([[n % 5] for n in numbers], lists),
        "user_id": [n % USERS for n in numbers],
    }
    read = {
        "user_id": list(range(USERS)),
        "impression_time_fixed": pa.array([[start - datetime.timedelta(days=1)]] * USERS, times),
        "article_id_fixed": pa.array([[7]] * USERS, lists),
    }
    pq.write_table(pa.table(shown), folder / "behaviors.parquet")
    pq.write_table(pa.table(read), folder / "history.parquet")


def _write(path: Path, lines: list[str]) -> None:
    path.write_text("\n".join(lines) + "\n")
