"""Preparing corpora: clips and hours of speech per second of one core, and whether memory stays flat.

The three kinds of speech corpora that most recipes are of, and text, are generated and prepared by the code of
tools/prepare_data.py, each in a process of its own. Clips in Parquet are decoded, checked and written to tar; members
of a tar archive and single files, which lhotse lists, are decoded, checked and left in place. The limit is the decoder:
the last column is the share of the time that decoding takes. Seconds are processor time, which a busy machine does not
change; waiting for the disk is not in them.

    python tools/benchmark.py prepare [--clips 1000] [--rows 100000]
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import soundfile
from benchmarks.loader import private_mib
from rich.console import Console
from rich.table import Table

from vita_audio.audio import load_audio
from vita_audio.cli.arguments import command_parser
from vita_audio.corpora import Settings, find_recipe, prepare, read_recipes
from vita_audio.corpora.samples import Builder

RATE = 16_000
TEXT = (
    "every lamp in the town was lit and the quiet river ran on past the mill while a small boat waited, row "
)
PER_FILE = 1000

Kind = tuple[Callable[[Path, int], tuple[str, list[bytes]]], int, float]
"""Makes a corpus and returns its recipe and some clips; number of rows; seconds of a clip, 0 for text."""


def main(argv: Sequence[str]) -> None:
    parser = command_parser(__doc__, prog="benchmark.py prepare")
    parser.add_argument("--clips", type=int, default=1000, help="clips of each kind of speech")
    parser.add_argument("--rows", type=int, default=100_000, help="rows of text")
    parser.add_argument("--folder", help="on the disk to measure (default: the one for temporary files)")
    options = parser.parse_args(argv)
    table = Table(title="preparing, one core")
    for heading in ("kind", "rows", "rows/s", "hours/s", "memory after a tenth", "at the end", "decoding"):
        table.add_column(heading, justify="left" if heading == "kind" else "right")
    result: dict = {"benchmark": "prepare"}
    for kind, (_, count, seconds) in _kinds(options).items():
        with (
            tempfile.TemporaryDirectory(dir=options.folder) as folder,
            multiprocessing.get_context("spawn").Pool(1) as pool,
        ):
            result[kind] = one = pool.apply(_measure, (kind, options, Path(folder)))
        table.add_row(
            kind,
            f"{count:,}",
            f"{one['rows_per_second']:,.0f}",
            f"{one['rows_per_second'] * seconds / 3600:.2f}" if seconds else "–",
            f"{one['early_mib']:.0f} MiB",
            f"{one['late_mib']:.0f} MiB",
            f"{one['decoding']:.0%}" if seconds else "–",
        )
    Console().print(table)
    print(json.dumps(result))


def _kinds(options: argparse.Namespace) -> dict[str, Kind]:
    return {
        "Parquet with FLAC, 10 s": (_parquet, options.clips, 10),
        "tar with MP3, 10 s": (_tar, options.clips, 10),
        "single WAV files through lhotse, 5 s": (_files, options.clips, 5),
        "text": (_text, options.rows, 0),
    }


def _measure(kind: str, options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Prepare a corpus. Memory is all that the process holds for itself, libraries included."""
    make, count, _ = _kinds(options)[kind]
    name, clips = make(folder / "source", count)
    clock = _Clock(count // 10)
    started = time.process_time()
    prepared = prepare(find_recipe(name, read_recipes()), folder / "source", folder / "root", Settings())
    seconds = time.process_time() - started
    tally = max(prepared.values(), key=lambda tally: tally.read)
    if tally.samples != count:
        raise RuntimeError(f"{tally.samples} of {count} samples: {dict(tally.rejected)}")
    late = private_mib(os.getpid())
    started = time.process_time()
    for clip in clips:
        load_audio(clip)
    alone = (time.process_time() - started) / max(1, len(clips)) * count
    return {
        "rows_per_second": count / seconds,
        "early_mib": clock.memory,
        "late_mib": late,
        "decoding": alone / seconds,
    }


class _Clock:
    """Notes the process's memory when a builder has seen so many items."""

    def __init__(self, items: int) -> None:
        self.memory, seen, build = 0.0, 0, Builder.build

        def counting(builder: Builder, item: object) -> list:
            nonlocal seen
            seen += 1
            if seen == items:
                self.memory = private_mib(os.getpid())
            return build(builder, item)

        Builder.build = counting


def _clips(seconds: float, kind: str) -> list[bytes]:
    """Noise that comes and goes as syllables do, in twenty encoded clips."""
    at = np.arange(int(seconds * RATE)) / RATE
    found = []
    for seed in range(20):
        content = io.BytesIO()
        noise = 0.1 * np.random.default_rng(seed).standard_normal(len(at))
        loud = noise * (0.2 + np.sin(2 * np.pi * 3 * at) ** 2)
        soundfile.write(content, loud.clip(-0.9, 0.9), RATE, format=kind)
        found.append(content.getvalue())
    return found


def _parquet(source: Path, count: int) -> tuple[str, list[bytes]]:
    clips = _clips(10, "flac")
    (source / "data").mkdir(parents=True)
    for start in range(0, count, PER_FILE):
        rows = [
            {"audio": {"bytes": clips[row % 20], "path": "x.flac"}, "transcript": f"{TEXT}{row}", "speaker_id": row}
            for row in range(start, min(start + PER_FILE, count))
        ]  # fmt: skip
        path = source / f"data/train-{start:09d}.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=100)
    return "globe_v2", clips


def _tar(source: Path, count: int) -> tuple[str, list[bytes]]:
    clips = _clips(10, "mp3")
    (source / "Emilia/EN").mkdir(parents=True)
    with tarfile.open(source / "Emilia/EN/EN-B000000.tar", "w") as archive:
        for row in range(count):
            about = json.dumps({"text": f"{TEXT}{row}", "speaker": str(row % 9)}).encode()
            for name, content in ((f"{row}.json", about), (f"{row}.mp3", clips[row % 20])):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return "emilia", clips


def _files(source: Path, count: int) -> tuple[str, list[bytes]]:
    """SLR68, whose splits have a table each; lhotse wants a recording in every one."""
    clips = _clips(5, "wav")
    for split, rows in (("train", count), ("dev", 1), ("test", 1)):
        folder = source / "SLR68" / split / "14_3466"
        folder.mkdir(parents=True)
        lines = ["UtteranceID\tSpeakerID\tTranscription"]
        for row in range(rows):
            (folder / f"14_3466_{row:08d}.wav").write_bytes(clips[row % 20])
            lines.append(f"14_3466_{row:08d}.wav\t14_3466\t今天天气很好我们出去走走然后回家吃饭第{row}句")
        (folder.parent / "TRANS.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return "magicdata", clips


def _text(source: Path, count: int) -> tuple[str, list[bytes]]:
    (source / "data").mkdir(parents=True)
    with (source / "data/atlas-math-train.jsonl").open("w", encoding="utf-8") as file:
        for row in range(count):
            print(
                json.dumps({"instruction": f"What is {row} plus {row}?", "output": f"{TEXT}{row}."}),
                file=file,
            )
    return "atlas_math", []
