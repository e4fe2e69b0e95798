"""A small synthetic data set in the format of the host's MovieLens-1M reader.

python examples/upstream/ranking_data.py --out tmp

Every user likes one genre of items and comes back in sessions. Nine times in ten, a rating of 4 or
5 goes to an item of that genre or to one of the items that all users like. The host reads
`OUT/data/ml-1m/sasrec_format.csv`, in which a row is a user; `OUT/events.csv` holds the same log
with a row per event, for stage 1.
"""

import argparse
import csv
import random
from pathlib import Path

NUM_ITEMS = 60
NUM_GENRES = 3
NUM_HITS = 15
HOUR = 3600
COLUMNS = [
    "user_id",
    "sex",
    "age_group",
    "occupation",
    "zip_code",
    "sequence_item_ids",
    "sequence_ratings",
    "sequence_timestamps",
]
EVENT_COLUMNS = ["user_id", "item_id", "timestamp", "rating"]


def write_data(out: Path, *, num_users: int = 400, seed: int = 0) -> Path:
    """Write the file and return its path."""
    draw = random.Random(seed)
    path = out / "data" / "ml-1m" / "sasrec_format.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    events = out / "events.csv"
    with path.open("w", newline="") as file, events.open("w", newline="") as event_file:
        writer, event_writer = csv.writer(file), csv.writer(event_file)
        writer.writerow(COLUMNS)
        event_writer.writerow(EVENT_COLUMNS)
        for user in range(num_users):
            items, ratings, times = _history(draw)
            features = [user, draw.randrange(2), draw.randrange(7), draw.randrange(21), user]
            writer.writerow([*features, *(",".join(map(str, s)) for s in (items, ratings, times))])
            rows = zip(items, times, ratings, strict=True)
            event_writer.writerows((user, *row) for row in rows)
    return path


def _history(draw: random.Random) -> tuple[list[int], list[int], list[int]]:
    liked, now = draw.randrange(NUM_GENRES), 1_000_000_000
    items, ratings, times = [], [], []
    for _ in range(draw.randint(3, 8)):  # sessions
        now += draw.randint(HOUR, 48 * HOUR)
        for _ in range(draw.randint(4, 12)):
            now += draw.randint(1, 300)
            item = draw.randrange(1, NUM_ITEMS)
            good = item % NUM_GENRES == liked or item < NUM_HITS
            likes = good != (draw.random() < 0.1)
            items.append(item)
            ratings.append(draw.choice((4, 5)) if likes else draw.choice((1, 2, 3)))
            times.append(now)
    return items, ratings, times


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("tmp"))
    parser.add_argument("--num_users", type=int, default=400)
    options = parser.parse_args()
    print(write_data(options.out, num_users=options.num_users))
