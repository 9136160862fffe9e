"""Corpus access for the quickstart's generators, through the project's reader of sample files."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from vita_audio.chat import read_samples


def add_source(parser: argparse.ArgumentParser) -> None:
    """Add ``--corpus DIR`` and ``--data FILE …``, of which one is required."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--corpus", type=Path, metavar="DIR", help="folder with *_train.jsonl")
    source.add_argument("--data", type=Path, nargs="+", metavar="JSONL", help="files in the training format")


def training_files(corpus: Path) -> list[Path]:
    """The training sets of a corpus folder.

    Raises:
        ValueError: it has none.
    """
    files = sorted(corpus.glob("*_train.jsonl"))
    if not files:
        raise ValueError(
            f"{corpus}: no *_train.jsonl there; create them with tools/quickstart/make_spoken_arithmetic.py"
        )
    return files


def clips(files: Sequence[Path]) -> list[str]:
    """Every audio file named in the samples, once.

    Raises:
        SampleFileError: a sample cannot be used; the message names file and line.
        ValueError: no sample names audio.
    """
    found = dict.fromkeys(
        str(audio)
        for file in files
        for _, sample in read_samples(file, need_reply=False)
        for audio in sample.audios
    )
    if not found:
        raise ValueError(f"{', '.join(map(str, files))}: no sample names audio")
    return list(found)


def texts(files: Sequence[Path]) -> Iterator[str]:
    """The text of every message, without audio tags.

    Raises:
        SampleFileError: see :func:`clips`.
    """
    for file in files:
        for _, sample in read_samples(file, need_reply=False):
            yield from (message.text for message in sample.messages)
