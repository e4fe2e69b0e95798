"""Score a few candidates of one user with a running server, then again after one more event.

Between events the history is not sent again: the version in the last answer names it. A server that
does not keep it any more says so (409), and is sent the whole history.

python examples/serving/client.py --url http://127.0.0.1:8000 --items 1 2 3 4 5
"""

import argparse
import json

import httpx


def score(client: httpx.Client, request: dict, history: dict, version: str | None) -> dict:
    """The answer to a request for the candidates of one user.

    Args:
        client: of the server.
        request: user, candidates and their time.
        history: of the user.
        version: of the same history in an earlier answer, or None.
    """
    if version is not None:
        response = client.post("/score", json={**request, "history_version": version})
        if response.status_code != httpx.codes.CONFLICT:
            return response.raise_for_status().json()
    return client.post("/score", json={**request, "history": history}).raise_for_status().json()


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
            version = None  # of a history with this event
            for candidates in (options.items, options.items[::-1]):
                now += 60
                request = {"user_id": 1, "candidates": candidates, "time": now}
                answer = score(client, request, history, version)
                version = answer["history_version"]
                print(answer)


if __name__ == "__main__":
    main()
