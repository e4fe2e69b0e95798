"""A small synthetic data set in the format of the host's retrieval trainer.

python examples/upstream/retrieval_data.py FOLDER [--users 400]

Writes FOLDER/tmp/ml-1m/sasrec_format.csv and FOLDER/tmp/processed/ml-1m/movies.csv, which the host
reads from the current folder under the name "ml-1m". Users come in sessions. All items of a session
belong to one of 40 genres, and every user likes three of them.
"""

import argparse
import csv
import random
from pathlib import Path

MAX_ITEM_ID = 3952  # what the host expects of "ml-1m"
NUM_GENRES = 40
GENRES_OF_A_USER = 3
FIRST_SECOND = 1_700_000_000
PAUSE_SECONDS = 86_400


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--users", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    write(options.folder, users=options.users, seed=options.seed)
    print(f"wrote {options.users} users under {options.folder / 'tmp'}")


def write(folder: Path, *, users: int, seed: int = 0) -> None:
    """Write both files below `folder`."""
    chance = random.Random(seed)
    items = folder / "tmp" / "processed" / "ml-1m" / "movies.csv"
    histories = folder / "tmp" / "ml-1m" / "sasrec_format.csv"
    for file in (items, histories):
        file.parent.mkdir(parents=True, exist_ok=True)
    with items.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["movie_id", "title", "genres", "year", "cleaned_title"])
        for item in range(1, MAX_ITEM_ID + 1):
            title = f"Film {item}"
            writer.writerow([item, f"{title} (2000)", f"g{item % NUM_GENRES}", 2000, title])
    columns = ["user_id", "sequence_item_ids", "sequence_ratings", "sequence_timestamps"]
    with histories.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(columns)
        for user in range(1, users + 1):
            writer.writerow([user, *(",".join(map(str, column)) for column in history(chance))])


def history(chance: random.Random) -> tuple[list[int], list[int], list[int]]:
    """Items, ratings and seconds of one user, in order of time."""
    liked = chance.sample(range(NUM_GENRES), GENRES_OF_A_USER)
    second = FIRST_SECOND
    items: list[int] = []
    ratings: list[int] = []
    seconds: list[int] = []
    for _ in range(chance.randint(2, 6)):
        second += chance.randint(PAUSE_SECONDS, 5 * PAUSE_SECONDS)
        genre = chance.choice(liked)
        for _ in range(chance.randint(2, 8)):
            rank = min(int(chance.expovariate(0.2)), MAX_ITEM_ID // NUM_GENRES - 1)
            items.append(1 + genre + NUM_GENRES * rank)
            ratings.append(chance.randint(3, 5))
            seconds.append(second)
            second += chance.randint(0, 120)
    return items, ratings, seconds


if __name__ == "__main__":
    main()
