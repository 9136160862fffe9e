"""Precompute the speech codes of a data mix for training.

    torchrun --nproc_per_node 8 tools/tokenize_audio.py --dataset_name configs/sts_finetune_stage1.yaml \\
        --audio_tokenizer_type glm4voice --audio_tokenizer_path WEIGHTS --output_dir TOKENS

Runs on any number of processes and nodes that share a file system: each processes the files whose names
hash to its rank, sorts them by duration into batches, and writes Parquet shards. Files that are already encoded
are skipped, so a killed run can simply be restarted; it loses at most one shard.
Training reads the codes with ``--audio_token_cache TOKENS`` (vita_audio/data/token_cache.py).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm

from vita_audio import distributed
from vita_audio.audio import AudioError, AudioTokenizer, available_kinds, is_continuous_kind
from vita_audio.audio.archives import stored_size
from vita_audio.audio.io import audio_duration
from vita_audio.chat import SampleError, default_data_root, locate_file, parse_sample
from vita_audio.cli.arguments import command_parser
from vita_audio.data.mixing import SourceSpec, read_mix
from vita_audio.data.sources import MissingSource, Rows
from vita_audio.data.speech import CodecSpec, coded_audios
from vita_audio.data.token_cache import (
    CachedClip,
    CodecIdentity,
    audio_key,
    cached_sizes,
    content_hash,
    discrete_kind,
    path_hash,
    write_identity,
    write_shard,
)
from vita_audio.inference.pipeline import default_device
from vita_audio.models.open import check_device

logger = logging.getLogger("tokenize_audio")


def main(argv: Sequence[str] | None = None) -> None:
    """Encode this process's share of a mix.

    Raises:
        ValueError: the mix, the codec, the device or the cache folder cannot be used. Faults of single clips
            are counted.
    """
    options = parse_options(argv)
    options.device = str(check_device(options.device))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // distributed.local_world_size()))
    specs = [spec for spec in read_mix(options.dataset_name, options.data_root) if spec.ratio and spec.num]
    logger.info("%s", tokenize(specs, options, distributed.rank(), distributed.world_size()))


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument("--dataset_name", required=True, help="YAML of the data mix")
    parser.add_argument(
        "--audio_tokenizer_type",
        required=True,
        choices=available_kinds(),
        help="codec; for sensevoice kinds only the assistant's speech is turned into codes",
    )
    parser.add_argument("--audio_tokenizer_path", required=True, help="folder of the codec's weights")
    parser.add_argument("--output_dir", required=True, type=Path, help="the token cache")
    parser.add_argument(
        "--data_root", help="base folder of relative paths (default: $ROOT_PATH, else the mix's folder)"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda or cuda:N; auto uses this process's GPU")
    parser.add_argument(
        "--batch_seconds", type=float, default=240, help="seconds of speech per batch, including padding"
    )
    parser.add_argument("--shard_clips", type=int, default=5000, help="clips per shard")
    parser.add_argument("--shard_minutes", type=float, default=10, help="maximum minutes between two shards")
    options = parser.parse_args(argv)
    if options.data_root is None:
        options.data_root = default_data_root(options.dataset_name)
    if options.device == "auto":
        options.device = default_device()
    return options


def tokenize(specs: list[SourceSpec], options: argparse.Namespace, rank: int, world_size: int) -> Summary:
    """Encode this rank's share of all audios that the specs name and the cache lacks."""
    codec = CodecSpec(
        options.audio_tokenizer_type, options.audio_tokenizer_path, device=options.device
    ).open_discrete()
    identity = CodecIdentity(discrete_kind(codec.kind), codec.fingerprint, codec.codebook_size)
    folder = options.output_dir / identity.folder_name
    write_identity(folder, identity)

    summary = Summary(rank, folder / f"failures-{rank:05d}.jsonl")
    done = cached_sizes(folder)
    todo = []
    for path in sorted(_audios(specs, options, rank, world_size, summary), key=_rows_in_order):
        key = audio_key(path, options.data_root)
        if key in done and _unchanged(path, done[key]):
            summary.there_already += 1
        else:
            todo.append(path)
    del done

    writer = _ShardWriter(folder, rank, options.shard_clips, options.shard_minutes * 60)
    with tqdm(total=len(todo), unit="clip", desc=f"rank {rank}", disable=rank != 0) as progress:
        for batch in _batches(todo, options.batch_seconds, summary):
            for clip in _encode(codec, batch, options.data_root, summary):
                writer.add(clip)
                summary.add(clip)
            progress.update(len(batch))
            progress.set_postfix_str(f"{summary.hours_per_second:.4f} h/s, {summary.failures.total()} failed")
    writer.finish()
    return summary


class Summary:
    """Progress of a rank; failures are logged immediately."""

    def __init__(self, rank: int, failure_file: Path) -> None:
        self.rank = rank
        self.clips = self.there_already = 0
        self.seconds = 0.0
        self.failures: Counter[str] = Counter()
        self.bad_samples: Counter[str] = Counter()
        self._failure_file = failure_file
        self._started = time.monotonic()

    def add(self, clip: CachedClip) -> None:
        self.clips += 1
        self.seconds += clip.seconds

    def fail(self, path: str, reason: str, message: str) -> None:
        self.failures[reason] += 1
        with open(self._failure_file, "a", encoding="utf-8") as file:
            line = json.dumps({"path": path, "reason": reason, "message": message}, ensure_ascii=False)
            file.write(line + "\n")

    @property
    def hours_per_second(self) -> float:
        return self.seconds / 3600 / max(1e-9, time.monotonic() - self._started)

    def __str__(self) -> str:
        failures = ", ".join(f"{reason} {count}" for reason, count in self.failures.most_common()) or "none"
        samples = ", ".join(f"{reason} {count}" for reason, count in self.bad_samples.most_common()) or "none"
        return (
            f"rank {self.rank}: {self.clips} clips, {self.seconds / 3600:.3f} hours, "
            f"{self.hours_per_second:.5f} hours of speech per second; {self.there_already} were already encoded; "
            f"failures: {failures}; unusable samples: {samples}"
        )


def _rows_in_order(path: str) -> list[str | int]:
    """A key that sorts numbers by value: rows of a Parquet file are fastest to read in their order."""
    return [int(part) if at % 2 else part for at, part in enumerate(re.split("([0-9]+)", path))]


def _unchanged(path: str, size: int) -> bool:
    """Whether a clip is as it was encoded; one that is gone needs no new codes."""
    try:
        return stored_size(path) == size
    except OSError:
        return True


def _audios(
    specs: list[SourceSpec], options: argparse.Namespace, rank: int, world_size: int, summary: Summary
) -> set[str]:
    """Paths of this rank's clips that become codes, over all rows of all files."""
    mine: set[str] = set()
    for path in dict.fromkeys(spec.path for spec in specs):
        try:
            rows = Rows(path)
        except MissingSource as error:
            logger.warning("left out: %s", error)
            continue
        for index in tqdm(range(len(rows)), desc=path.name, unit="row", leave=False, disable=rank != 0):
            try:
                sample = parse_sample(rows[index])
            except SampleError as error:
                summary.bad_samples[error.reason] += 1
                continue
            for audio in coded_audios(sample, is_continuous_kind(options.audio_tokenizer_type)):
                located = locate_file(audio, options.data_root, path.parent)
                if int(path_hash(audio_key(located, options.data_root))) % world_size == rank:
                    mine.add(located)
    return mine


def _batches(paths: list[str], batch_seconds: float, summary: Summary) -> Iterator[list[tuple[str, float]]]:
    """Batches of (path, seconds) of similar duration, at most ``batch_seconds`` each including padding."""
    paths_left = iter(paths)
    while window := list(islice(paths_left, 4096)):
        timed = []
        for path in window:
            try:
                timed.append((path, audio_duration(path)))
            except AudioError as error:
                summary.fail(path, error.reason, str(error))
        batch: list[tuple[str, float]] = []
        for path, seconds in sorted(timed, key=lambda item: item[1]):
            if batch and seconds * (len(batch) + 1) > batch_seconds:
                yield batch
                batch = []
            batch.append((path, seconds))
        if batch:
            yield batch


def _encode(
    codec: AudioTokenizer, batch: list[tuple[str, float]], data_root: str | Path, summary: Summary
) -> Iterator[CachedClip]:
    """Clips of a batch; if the batch fails, its files are tried one by one."""
    paths = [path for path, _ in batch]
    try:
        codes: Sequence[list[int] | None] = codec.encode_batch(paths)
    except Exception:
        codes = [_encode_alone(codec, path, summary) for path in paths]
    for (path, seconds), clip_codes in zip(batch, codes, strict=True):
        if clip_codes is None:
            continue
        if not clip_codes:
            summary.fail(path, "empty", f"{path}: the codec returned no codes")
            continue
        yield CachedClip(
            audio_key(path, data_root), content_hash(path), stored_size(path), seconds, list(clip_codes)
        )


def _encode_alone(codec: AudioTokenizer, path: str, summary: Summary) -> list[int] | None:
    try:
        return codec.encode(path)
    except AudioError as error:
        summary.fail(path, error.reason, str(error))
    except Exception as error:  # a fault caused by one file must not affect the others
        summary.fail(path, "internal", f"{path}: {type(error).__name__}: {error}")
    return None


class _ShardWriter:
    """Collects clips and writes a shard when there are enough, or when the last one is too long ago."""

    def __init__(self, folder: Path, rank: int, clips: int, seconds: float) -> None:
        self._folder, self._rank, self._limit, self._interval = folder, rank, clips, seconds
        self._clips: list[CachedClip] = []
        self._last = time.monotonic()

    def add(self, clip: CachedClip) -> None:
        self._clips.append(clip)
        if len(self._clips) >= self._limit or time.monotonic() - self._last > self._interval:
            self.finish()

    def finish(self) -> None:
        if self._clips:
            write_shard(self._folder, f"{self._rank:05d}-{time.time_ns()}", self._clips)
        self._clips, self._last = [], time.monotonic()
