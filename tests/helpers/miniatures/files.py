"""Files of miniatures: clips of a warble, tables, Parquet files and archives."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import tarfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import soundfile

Expected = dict[str, tuple[int, dict[str, int]]]
ENGLISH = [
    "the quiet river runs past the mill",
    "a small boat waits at the bridge",
    "every lamp in town was lit",
]
CHINESE = ["今天天气很好我们出去走走", "他在北京的一家书店里工作", "请把窗户打开让空气进来"]
DAMAGED = {"audio_truncated": 1}


@lru_cache
def waveform(seed: int, seconds: float = 1.5, rate: int = 16_000) -> np.ndarray:
    """A warble in noise, different for every seed."""
    generator = np.random.default_rng(seed)
    time = np.arange(int(rate * seconds)) / rate
    pitch = 200 + 20 * (seed % 9) + 60 * np.sin(2 * math.pi * (2 + seed % 3) * time)
    tone = 0.3 * np.sin(2 * math.pi * np.cumsum(pitch) / rate)
    return (tone + 0.02 * generator.standard_normal(len(time))).astype(np.float32)


@lru_cache
def clip(seed: int, kind: str = "wav", seconds: float = 1.5) -> bytes:
    """Content of an audio file."""
    content, samples = io.BytesIO(), (32767 * waveform(seed, seconds)).astype(np.int16)
    soundfile.write(content, samples, 16_000, format=kind)
    return content.getvalue()


def damaged(seed: int, kind: str = "wav") -> bytes:
    content = clip(seed, kind)
    return content[: len(content) // 2]


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def lines(*values: object) -> str:
    return "".join(
        f"{value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}\n" for value in values
    )


def parquet(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def tar(path: Path, members: dict[str, bytes | str], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            content = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def table(rows: list[dict], delimiter: str) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def wenetspeech_part(
    folder: Path, name: str, ids: Sequence[str], texts: Sequence[str], clips: Sequence[bytes]
) -> None:
    """A gzipped archive of WenetSpeech and its manifest, cuts of lhotse, as the publisher packs them.

    Args:
        ids: of the clips, which are below ``NAME/IDS[0][:3]/`` in the archive.
        texts: their transcripts.
        clips: their content; a damaged one counts as long as a whole one.
    """
    from lhotse import MonoCut, Recording, SupervisionSegment
    from lhotse.audio import AudioSource

    cuts, members = [], {}
    for id_, text, content in zip(ids, texts, clips, strict=True):
        path = f"{name}/{id_[:3]}/{id_}.wav"
        recording = Recording(id_, [AudioSource("file", [0], f"data/{path}")], 16_000, 24_000, 1.5)
        said = SupervisionSegment(id_, id_, 0, 1.5, text=text, language="Chinese")
        cuts.append(MonoCut(id_, 0, 1.5, 0, [said], recording=recording))
        members[path] = content
    tar(folder / f"{name}.tar.gz", members, "w:gz")
    write(folder / f"{name}.jsonl.gz", gzip.compress(lines(*(cut.to_dict() for cut in cuts)).encode()))
