"""Serve a folder over HTTP; see docs/serving.md.

python -m hpgr_plugin.serving --model FOLDER --port 8000
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from hpgr_plugin.errors import HpgrError, one_line
from hpgr_plugin.serving.batcher import BatchLimits
from hpgr_plugin.serving.scorer import Scorer
from hpgr_plugin.serving.slates import SlateServer


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and serve until SIGINT or SIGTERM."""
    options = _parser().parse_args(arguments)
    try:
        import uvicorn

        from hpgr_plugin.serving.app import ServerSettings, SizeLimits, create_app
    except ImportError as error:
        _fail(f"the server needs the extra serve ({error}): pip install '.[serve]'")
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        scorer = Scorer.load(
            options.model,
            device=options.device,
            cache_mib=options.cache_mib,
            capture=not options.no_capture,
        )
        slates = None
        if options.slates is not None:
            slates = SlateServer.load(options.slates, device=options.device)
    except (HpgrError, OSError) as error:
        _fail(one_line(error))
    settings = ServerSettings(
        SizeLimits(max_history=options.max_history, max_candidates=options.max_candidates),
        BatchLimits(
            wait_seconds=options.batch_wait_ms / 1000,
            max_requests=options.batch_requests,
            max_waiting=options.max_waiting,
        ),
    )
    uvicorn.run(
        create_app(scorer, settings, slates),
        host=options.host,
        port=options.port,
        log_level="info" if options.log_requests else "warning",
        timeout_graceful_shutdown=options.stop_seconds,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m hpgr_plugin.serving", description=__doc__)
    parser.add_argument("--model", required=True, type=Path, help="folder of serving.export")
    parser.add_argument("--slates", type=Path, help="folder of a slate run: POST /slate as well")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--device", default=None, help="default: a GPU, if there is one")
    parser.add_argument("--threads", type=int, default=0, help="of torch; default: torch's own")
    parser.add_argument("--cache_mib", type=int, default=256, help="kept histories; 0: none")
    parser.add_argument("--no_capture", action="store_true", help="no CUDA graphs of requests")
    parser.add_argument("--batch_wait_ms", type=float, default=2.0)
    parser.add_argument("--batch_requests", type=int, default=32)
    parser.add_argument("--max_waiting", type=int, default=1024, help="others get 503")
    parser.add_argument("--max_history", type=int, default=65_536, help="longer: 413")
    parser.add_argument("--max_candidates", type=int, default=16_384, help="more: 413")
    parser.add_argument("--stop_seconds", type=int, default=30, help="for requests under way")
    parser.add_argument("--log_requests", action="store_true")
    return parser


def _fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
