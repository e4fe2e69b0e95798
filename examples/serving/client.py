"""Score a few candidates of one user with a running server, then again after one more event.

python examples/serving/client.py --url http://127.0.0.1:8000 --items 1 2 3 4 5
"""

import argparse
import json

import httpx


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--items", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="item ids")
    parser.add_argument("--action", default="1", help="of every history item, as JSON")
    options = parser.parse_args()
    action, now = json.loads(options.action), 1_000_000_000
    history: dict[str, list] = {"items": [], "times": [], "actions": []}
    with httpx.Client(base_url=options.url, timeout=30) as client:
        print(client.get("/healthz").json())
        for item in options.items[:3]:
            history["items"].append(item)
            history["times"].append(now)
            history["actions"].append(action)
            now += 60
            body = {
                "user_id": 1,
                "history": history,
                "candidates": options.items,
                "time": now,
            }
            response = client.post("/score", json=body)
            print(response.status_code, response.json())


if __name__ == "__main__":
    main()
