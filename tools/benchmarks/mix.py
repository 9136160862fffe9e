"""Opening a large mix: seconds and memory, from an empty and from a warm Arrow cache.

The published mix names 116 files, and its largest have millions of rows. One file of short samples is generated and
linked under as many names as asked, so it takes up space once; each name has an Arrow copy of its own, as a
different file would. The mix is opened in a new process, which converts every file; then in another one, which finds
the copies, and reads samples at random positions of the stream. The limit is the disk for the first, and for the
second some milliseconds a file: nothing but the ends of blocks is read.

    python tools/benchmark.py mix [--files 116] [--rows 1000000] [--folder DIR]

The copies need about 110 bytes a row: 13 GB with the defaults.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.loader import private_mib
from rich.console import Console
from rich.table import Table

from vita_audio.cli.arguments import command_parser
from vita_audio.data.mixing import Mix, read_mix

READS = 2000


def main(argv: Sequence[str]) -> None:
    parser = command_parser(__doc__, prog="benchmark.py mix")
    parser.add_argument("--files", type=int, default=116)
    parser.add_argument("--rows", type=int, default=1_000_000, help="of each file")
    parser.add_argument("--folder", help="on the disk to measure (default: the one for temporary files)")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        _measure(options, Path(folder))


def _measure(options: argparse.Namespace, folder: Path) -> None:
    _write_mix(options, folder)
    table = Table(title=f"a mix of {options.files} files of {options.rows:,} rows")
    for heading in (
        "Arrow cache",
        "opens in",
        "rows/s",
        "private memory",
        "with mapped files",
        "one random sample",
    ):
        table.add_column(heading, justify="left" if heading == "Arrow cache" else "right")
    result: dict = {"benchmark": "mix", "files": options.files, "rows": options.rows}
    context = multiprocessing.get_context("spawn")
    for name in ("empty", "warm"):
        with context.Pool(1) as pool:
            result[name] = one = pool.apply(_open, (folder,))
        table.add_row(
            name, f"{one['seconds']:.1f} s", f"{options.files * options.rows / one['seconds']:,.0f}",
            f"{one['private_mib']:.0f} MiB", f"{one['resident_mib']:.0f} MiB", f"{one['sample_ms']:.2f} ms",
        )  # fmt: skip
    Console().print(table)
    print(json.dumps(result))


def _write_mix(options: argparse.Namespace, folder: Path) -> None:
    with (folder / "0.jsonl").open("w", encoding="utf-8") as file:
        for row in range(options.rows):
            reply = {"role": "assistant", "content": f"reply {row}"}
            print(json.dumps({"messages": [{"role": "user", "content": "x"}, reply]}), file=file)
    for name in range(1, options.files):
        os.link(folder / "0.jsonl", folder / f"{name}.jsonl")
    paths = ", ".join(f"{name}.jsonl" for name in range(options.files))
    (folder / "mix.yaml").write_text(f"dataset: {{all: {{data_paths: [{paths}]}}}}\n", encoding="utf-8")


def _open(folder: Path) -> dict[str, float]:
    """Open the mix and read samples; memory is what both added to the process."""
    before = private_mib(os.getpid()), _resident_mib()
    started = time.perf_counter()
    mix = Mix(read_mix(folder / "mix.yaml", folder), 0, strict=True, cache_dir=str(folder / "arrow"))
    opened = time.perf_counter()
    for position in range(READS):
        mix.raw(mix.place(position))
    read = time.perf_counter()
    return {
        "seconds": opened - started,
        "private_mib": private_mib(os.getpid()) - before[0],
        "resident_mib": _resident_mib() - before[1],
        "sample_ms": (read - opened) / READS * 1000,
    }


def _resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 2**20
