"""Packing: how full the rows are and the cost of packing, compared with the greedy packer.

Greedy keeps one open row per source and starts a new one when a document does not fit, which is what the
public code does. Ours keeps a few rows open for all sources and puts each document where it fits best
(vita_audio/data/packing.py). Same documents, same order, same run. The limit is 100%: computation on
padding is wasted.

    python tools/benchmark.py packing [--capacity 8192] [--documents 20000] [--sources 40]
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from math import log

from rich.console import Console
from rich.table import Table

from vita_audio.cli.arguments import command_parser
from vita_audio.data.packing import RowPacker

MEAN_LENGTH = 180
SIGMAS = (0.8, 1.4)
"""Spread of the logarithm of document lengths: speech recognition and synthesis, and with text sets added."""


def main(argv: Sequence[str]) -> None:
    parser = command_parser(__doc__, prog="benchmark.py packing")
    parser.add_argument("--capacity", type=int, default=8192, help="tokens in a row")
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--sources", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)

    table = Table(title=f"{options.documents} documents into rows of {options.capacity} tokens")
    for heading in ("spread", "packer", "rows", "fill", "open", "wait", "docs/s"):
        table.add_column(heading, justify="left" if heading in ("spread", "packer") else "right")
    results = []
    for sigma in SIGMAS:
        documents = _documents(options, sigma)
        for name, pack in (
            ("greedy, one source", lambda documents: _greedy(documents, options.capacity, by_source=False)),
            (
                f"greedy, {options.sources} sources",
                lambda documents: _greedy(documents, options.capacity, True),
            ),
            ("best fit (ours)", lambda documents: _best_fit(documents, options.capacity)),
        ):
            result = _measure(pack, documents, options.capacity)
            table.add_row(
                f"σ {sigma}",
                name,
                str(result["rows"]),
                f"{result['fill']:.2%}",
                f"{result['open_share']:.2%}",
                str(result["longest_wait"]),
                f"{result['documents_per_second']:,.0f}",
            )
            results.append({"sigma": sigma, "packer": name, **result})
        table.add_section()
    Console().print(table)
    Console().print(
        f"lengths are log-normal with mean {MEAN_LENGTH} and spread σ; fill: of finished rows; open: "
        "share of tokens in unfinished rows at the end, lost by the public code, kept for the next epoch by ours; "
        "wait: most documents that arrived between a document and the end of its row"
    )
    print(json.dumps({"benchmark": "packing", "results": results}))


def _documents(options: argparse.Namespace, sigma: float) -> list[tuple[int, int]]:
    """(length, source) of each document; sources differ in size as in a real mix."""
    rng = random.Random(options.seed)
    mu = log(MEAN_LENGTH) - sigma**2 / 2
    sizes = [1 / (rank + 1) for rank in range(options.sources)]
    sources = rng.choices(range(options.sources), weights=sizes, k=options.documents)
    return [
        (min(options.capacity, max(8, round(rng.lognormvariate(mu, sigma)))), source) for source in sources
    ]


# Documents of each row, with the arrival that finished it, followed by the rows that are still open.
Packed = tuple[list[tuple[int, list[int]]], list[list[int]]]


def _greedy(documents: list[tuple[int, int]], capacity: int, by_source: bool) -> Packed:
    rows = []
    open_rows: dict[int, list[int]] = {}
    used: dict[int, int] = {}
    for index, (length, source) in enumerate(documents):
        key = source if by_source else 0
        if used.get(key, 0) + length > capacity:
            rows.append((index, open_rows.pop(key)))
            used[key] = 0
        open_rows.setdefault(key, []).append(index)
        used[key] = used.get(key, 0) + length
    return rows, list(open_rows.values())


def _best_fit(documents: list[tuple[int, int]], capacity: int) -> Packed:
    packer: RowPacker[int] = RowPacker(capacity)
    rows = [(index, row) for index, (length, _) in enumerate(documents) if (row := packer.add(index, length))]
    return rows, list(packer.flush())


def _measure(
    pack: Callable[[list[tuple[int, int]]], Packed], documents: list[tuple[int, int]], capacity: int
) -> dict[str, float]:
    started = time.perf_counter()
    rows, still_open = pack(documents)
    seconds = time.perf_counter() - started
    packed = [index for _, row in rows for index in row]
    left = [index for row in still_open for index in row]
    if sorted(packed + left) != list(range(len(documents))):
        raise RuntimeError("the packer lost or repeated a document")
    tokens, tokens_left = (sum(documents[index][0] for index in part) for part in (packed, left))
    return {
        "rows": len(rows),
        "fill": tokens / (len(rows) * capacity),
        "open_share": tokens_left / (tokens + tokens_left),
        "longest_wait": max(finished - min(row) for finished, row in rows),
        "documents_per_second": len(documents) / seconds,
    }
