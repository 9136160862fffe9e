"""Loading: rows per second from cached codes, and whether a worker's memory stays constant.

A mix of spoken questions, speech synthesis and text is generated, with its codes in a token cache as
tools/tokenize_audio.py writes it. It is loaded twice, in the main process and by workers, in
one run. Then the workers continue to the requested number of samples while their private memory (RssAnon; mapped
files are shared and not counted) is recorded. Loading is fast enough when rows/s exceed the consumption of a
machine's GPUs: 7B on an H100 trains on about one row of 8192 tokens per second.

    python tools/benchmark.py loader [--workers 2] [--samples 50000]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import AutoTokenizer

from vita_audio.chat import ChatTokens
from vita_audio.cli.arguments import command_parser
from vita_audio.data import CodecSpec, DataConfig, TrainLoader, build_train_loader
from vita_audio.data.packing import RowPacker
from vita_audio.data.token_cache import CachedClip, CodecIdentity, write_identity, write_shard

REPOSITORY = Path(__file__).parents[2]
CLIPS = 4000
WORDS = (
    "the river opens before sunrise and a small robot keeps the green notebook near the old station".split()
)


def main(argv: Sequence[str]) -> None:
    parser = command_parser(__doc__, prog="benchmark.py loader")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--samples", type=int, default=50_000, help="samples over which memory is recorded")
    parser.add_argument("--rows", type=int, default=150, help="rows over which speed is measured")
    parser.add_argument("--seq_length", type=int, default=8192)
    parser.add_argument(
        "--tokenizer",
        default=str(REPOSITORY / "tests" / "goldens" / "data" / "tokenizer" / "glm4voice"),
        help="folder of an extended text tokenizer",
    )
    options = parser.parse_args(argv)
    if options.workers < 1:
        parser.error("--workers must be at least 1; the main process is always measured as well")
    with tempfile.TemporaryDirectory() as folder:
        _measure(options, Path(folder))


def _measure(options: argparse.Namespace, folder: Path) -> None:
    console = Console()
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    _write_mix(folder, ChatTokens.of(tokenizer).codebook_size)

    def open_loader(workers: int) -> TrainLoader:
        config = DataConfig(
            folder / "mix.yaml",
            seq_length=options.seq_length,
            num_workers=workers,
            token_cache=folder / "tokens",
            arrow_cache=str(folder / "arrow"),
        )
        return build_train_loader(config, tokenizer, CodecSpec("glm4voice"))

    table = Table(title=f"rows of {options.seq_length} tokens from cached codes, {options.rows} rows each")
    for heading in ("loader", "rows/s", "samples/s", "tokens/s"):
        table.add_column(heading, justify="left" if heading == "loader" else "right")
    result: dict = {"benchmark": "loader", "workers": options.workers}
    packing = _PackingClock()
    for name, workers in (("main process", 0), (f"{options.workers} workers", options.workers)):
        loader = open_loader(workers)
        stream = iter(loader)
        for _ in range(max(1, 4 * workers)):  # workers start, caches warm up
            next(stream)
        with packing:
            rows_per_second, samples_per_second = _speed(loader, stream, options.rows)
        table.add_row(
            name,
            f"{rows_per_second:.1f}",
            f"{samples_per_second:.0f}",
            f"{rows_per_second * options.seq_length:,.0f}",
        )
        result[name.split()[-1]] = {
            "rows_per_second": rows_per_second,
            "samples_per_second": samples_per_second,
        }
        if workers == 0:
            result["packing_share"] = packing.seconds / (options.rows / rows_per_second)
    console.print(table)
    console.print(f"packing takes {result['packing_share']:.2%} of the main process's loading time")

    memory = _watch_memory(loader, stream, options.samples)
    table = Table(title=f"private memory of the {options.workers} workers, MiB")
    table.add_column("samples read", justify="right")
    for worker in range(options.workers):
        table.add_column(f"worker {worker}", justify="right")
    for samples, sizes in memory:
        table.add_row(f"{samples:,}", *(f"{size:.1f}" for size in sizes))
    console.print(table)
    settled = [sum(sizes) / len(sizes) for _, sizes in memory[1:]]
    result["memory_growth_mib"] = settled[-1] - settled[0]
    console.print(f"growth after the first tenth: {result['memory_growth_mib']:+.1f} MiB a worker")
    print(json.dumps(result))


def _speed(loader: TrainLoader, stream: Iterator, rows: int) -> tuple[float, float]:
    samples_before, started = loader.report.seen, time.perf_counter()
    for _ in islice(stream, rows):
        pass
    seconds = time.perf_counter() - started
    return rows / seconds, (loader.report.seen - samples_before) / seconds


class _PackingClock:
    """Measures the time spent in the packer while active."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._add = RowPacker.add
        clock, add = self, RowPacker.add

        def timed_add(packer, document, length):
            started = time.perf_counter()
            try:
                return add(packer, document, length)
            finally:
                clock.seconds += time.perf_counter() - started

        RowPacker.add = timed_add

    def __exit__(self, *_) -> None:
        RowPacker.add = self._add


def _watch_memory(loader: TrainLoader, stream: Iterator, samples: int) -> list[tuple[int, list[float]]]:
    workers = sorted(multiprocessing.active_children(), key=lambda process: process.pid)
    measured: list[tuple[int, list[float]]] = []
    start = loader.report.seen
    with tqdm(total=samples, unit="sample", desc="watching memory") as progress:
        for part in range(11):
            while loader.report.seen - start < samples * part / 10:
                next(stream)
            progress.update(loader.report.seen - start - progress.n)
            measured.append((loader.report.seen - start, [private_mib(process.pid) for process in workers]))
    return measured


def private_mib(process: int) -> float:
    status = Path(f"/proc/{process}/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) / 1024


def _write_mix(folder: Path, codebook_size: int) -> None:
    """Three files of samples that share a few thousand clips, and the clips' codes."""
    rng = random.Random(0)
    identity = CodecIdentity("glm4voice", "benchmark", codebook_size)
    write_identity(folder / "tokens" / identity.folder_name, identity)
    clips = []
    for index in range(CLIPS):
        codes = [rng.randrange(codebook_size) for _ in range(rng.randint(20, 150))]
        clips.append(CachedClip(f"audio/{index}.wav", f"{index:032x}", 0, len(codes) / 12.5, codes))
    write_shard(folder / "tokens" / identity.folder_name, "00000", clips)

    def text() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(5, 60)))

    def audio() -> str:
        return f"audio/{rng.randrange(CLIPS)}.wav"

    kinds = {
        "sqa": lambda: (("<|audio|>", f"{text()}\n<|audio|>"), [audio(), audio()]),
        "tts": lambda: ((f"Convert the text to speech.\n{text()}", "<|audio|>"), [audio()]),
        "text": lambda: ((text(), text()), []),
    }
    for kind, make in kinds.items():
        with open(folder / f"{kind}.jsonl", "w", encoding="utf-8") as file:
            for _ in range(5000):
                (question, answer), audios = make()
                messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                print(json.dumps({"messages": messages, "audios": audios}), file=file)
    entries = "".join(f"  {kind}:\n    data_paths: [{kind}.jsonl]\n" for kind in kinds)
    (folder / "mix.yaml").write_text(f"dataset:\n{entries}", encoding="utf-8")
