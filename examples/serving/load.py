"""Load a running server: clients that ask one request after another; latencies and throughput.

python examples/serving/load.py --model FOLDER --clients 8 --seconds 10

Item ids and actions are drawn from the vocabulary of the served folder. Every user comes back with
the same history (`--repeat` is the share), or with one event more. With `--named` a history that
was scored is not sent again: its version names it, until the server answers that it is not kept.
"""

import argparse
import asyncio
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from hpgr_plugin.serving.folder import read_folder


async def client(
    url: str, users: list[dict[str, Any]], draw: random.Random, end: float, options: Any
) -> tuple[list[float], Counter[int]]:
    """Ask until `end`; seconds of every request, and how many had which status."""
    seconds, statuses = [], Counter[int]()
    async with httpx.AsyncClient(base_url=url, timeout=60) as session:
        while time.perf_counter() < end:
            user = draw.choice(users)
            if draw.random() > options.repeat:
                add_event(user, draw)
            start = time.perf_counter()
            body = {
                "user_id": user["id"],
                "candidates": draw.choices(user["items"], k=options.candidates),
                "time": user["history"]["times"][-1] + 60,
            }
            version = user.get("version") if options.named else None
            given = {"history": user["history"]}
            response = await session.post(
                "/score", json={**body, **({"history_version": version} if version else given)}
            )
            if version and response.status_code == httpx.codes.CONFLICT:
                statuses[response.status_code] += 1
                response = await session.post("/score", json={**body, **given})
            seconds.append(time.perf_counter() - start)
            statuses[response.status_code] += 1
            if response.status_code == httpx.codes.OK:
                user["version"] = response.json()["history_version"]
    return seconds, statuses


def add_event(user: dict[str, Any], draw: random.Random) -> None:
    history = user["history"]
    user["version"] = None
    history["items"].append(draw.choice(user["items"]))
    history["times"].append(history["times"][-1] + draw.randint(1, 600))
    history["actions"].append(draw.choice(user["actions"]))


def make_users(options: Any, draw: random.Random) -> list[dict[str, Any]]:
    """Users with the ids that the model knows."""
    vocabulary = read_folder(options.model).vocabulary
    actions = vocabulary.action_values
    known = list(range(vocabulary.num_actions)) if actions is None else actions.tolist()
    users = []
    for number in range(options.users):
        history = {"items": [], "times": [1_000_000_000], "actions": []}
        user = {"items": vocabulary.item_ids.tolist(), "actions": known, "history": history}
        for _ in range(options.history):
            add_event(user, draw)
        history["times"].pop(0)
        # Known ids keep their features; others are new users.
        ids = vocabulary.user_ids.tolist()
        users.append({**user, "id": ids[number % len(ids)]})
    return users


async def run(options: Any) -> None:
    draw = random.Random(options.seed)
    users = make_users(options, draw)
    shares = [users[number :: options.clients] or users for number in range(options.clients)]
    end = time.perf_counter() + options.seconds
    results = await asyncio.gather(
        *(client(options.url, share, draw, end, options) for share in shares)
    )
    seconds = np.concatenate([part for part, _ in results])
    statuses = sum((count for _, count in results), Counter[int]())
    p50, p99 = 1e3 * np.percentile(seconds, [50, 99])
    rate = len(seconds) / options.seconds
    print(f"{len(seconds)} requests, statuses {dict(statuses)}")
    print(f"p50 {p50:.1f} ms, p99 {p99:.1f} ms, {rate:.0f} requests/s", end=", ")
    print(f"{rate * options.candidates:.0f} candidates/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", required=True, type=Path, help="the folder that is served")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--users", type=int, default=64)
    parser.add_argument("--history", type=int, default=100)
    parser.add_argument("--candidates", type=int, default=64)
    parser.add_argument("--repeat", type=float, default=0.5)
    parser.add_argument("--named", action="store_true", help="send no history that was scored")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
