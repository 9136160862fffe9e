"""Replicas that come with the load and go when it ends, without a failed request.

``python tools/benchmark.py scale --url http://127.0.0.1:8000 --questions FILE.jsonl --talkers 6``

The server is a cluster: ``scripts/serve.sh --ray --replicas 1 --most_replicas 2 --slots 2 --grow_seconds 5
--shrink_seconds 20``. The talkers of ``soak`` come until there is one replica more than at first, and have it answer;
then all but one leave, who goes on until there are as few as at first. So there are requests while a replica starts and
while one ends. Replicas are counted by their names in ``/metrics``. Ends with status 1 if an honest request fails or if
the replicas do not come or go within ``--patience`` seconds. The last line is the figures as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import random
import time
from collections.abc import Callable
from typing import Any
from urllib.request import urlopen

from benchmarks.serve import add_questions, add_server, read_questions
from benchmarks.soak import Crowd, add_visitors, talk
from prometheus_client.parser import text_string_to_metric_families

from vita_audio.cli.arguments import command_parser
from vita_audio.provenance import versions

LOOKS = 3
"""Looks in a row that must agree: a page of figures may lack a replica that is busy."""


def main(argv: list[str] | None = None) -> None:
    """Run and print."""
    args = parse(argv)
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # a line for each request
    crowd, record = asyncio.run(scale(args, read_questions(args.questions, args.limit)))
    print(json.dumps({"benchmark": "scale"} | record | {"versions": versions()}))
    if crowd.failures:
        raise ValueError(f"{len(crowd.failures)} requests failed; {crowd.failures[:3]}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__, prog="tools/benchmark.py scale")
    add_server(parser, "cluster")
    add_questions(parser)
    add_visitors(parser, talkers=6)
    parser.add_argument(
        "--patience", type=float, default=900, metavar="S", help="longest wait for a replica, in seconds"
    )
    return parser.parse_args(argv)


async def scale(args: argparse.Namespace, questions: list[bytes]) -> tuple[Crowd, dict[str, Any]]:
    """Load and unload the cluster.

    Raises:
        ValueError: the replicas do not come or go, or the server is no cluster.
    """
    crowd = Crowd()
    first = len(await answers(args))
    if not first:
        raise ValueError(f"{args.url}: is no cluster; its figures name no replica")
    leave, end = asyncio.Event(), asyncio.Event()
    talkers = [
        asyncio.create_task(talk(args, questions, random.Random(seed), crowd, leave if seed else end))
        for seed in range(args.talkers)
    ]
    try:
        # A replica counts once it has answered.
        grown = await seconds_until(args, lambda found: sum(map(bool, found.values())) > first)
        leave.set()
        shrunk = await seconds_until(args, lambda found: len(found) <= first)
    finally:
        leave.set()
        end.set()
        await asyncio.gather(*talkers)
    return crowd, {
        "replicas": first,
        "talkers": args.talkers,
        "one_more_after_seconds": grown,
        "one_fewer_after_seconds": shrunk,
        "visits": dict(crowd.counts),
        "failures": len(crowd.failures),
    }


async def seconds_until(args: argparse.Namespace, holds: Callable[[dict[str, float]], bool]) -> float:
    """How long it takes until something holds for the replicas."""
    began, looks = time.monotonic(), 0
    while looks < LOOKS:
        found = await answers(args)
        looks = looks + 1 if found and holds(found) else 0
        if time.monotonic() - began > args.patience:
            raise ValueError(f"the replicas are still {len(found)} after {args.patience:g} s")
        await asyncio.sleep(0.2)
    return round(time.monotonic() - began, 1)


async def answers(args: argparse.Namespace) -> dict[str, float]:
    """The complete replies of each replica, by its name."""
    page = await asyncio.to_thread(_read, f"{args.url.rstrip('/')}/metrics")
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            name = sample.labels.get("replica")
            if name is not None:
                is_reply = sample.labels.get("outcome") == "complete"
                found[name] = found.get(name, 0) + (sample.value if is_reply else 0)
    return found


def _read(address: str) -> str:
    with urlopen(address, timeout=30) as page:
        return str(page.read().decode())
