"""Public test sets -> the files that benchmarks read.

The readers are those of the training corpora (:mod:`vita_audio.corpora`), without their cleaning: a test set is
prepared whole, or not at all. Beside the file, ``FILE.prepared.json`` keeps a checksum of the set and its recordings;
every result has the checksum of what it was scored on, and says when the two differ.
"""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor

from vita_audio.corpora import Cleaning, Part, Recipe, Settings, SourceError, prepare
from vita_audio.corpora.layouts import matching
from vita_audio.evaluation.benchmarks import Benchmark
from vita_audio.evaluation.results import items_fingerprint
from vita_audio.evaluation.scoreboard import TASKS
from vita_audio.evaluation.tasks import SeedTTS
from vita_audio.files import read_json, read_json_lines, whole_file, write_json

_ABOUT = ("page", "source", "from", "layout", "normalise")
_SEED_TTS = "seed_tts"
_LANGUAGES = ("zh", "en")


@dataclass(frozen=True)
class KeepEverything(Cleaning):
    """No limits: every utterance of a test set counts."""

    def check_text(self, text: str, languages: tuple[str, ...]) -> None:
        return

    def check_speed(self, text: str, seconds: float) -> None:
        return

    def check_waveform(self, waveform: Tensor, rate: int) -> None:
        return


def prepare_benchmark(one: Benchmark, source: Path, root: Path, workers: int = 1) -> dict[str, Any]:
    """Write a benchmark's file and its recordings below ``root``.

    Args:
        source: what the publisher offers, see the benchmark's ``prepare: source``.

    Returns:
        What ``FILE.prepared.json`` holds: name, number of items, checksum.

    Raises:
        ValueError: ``source`` does not hold it, or an item cannot be used; the message names the first.
    """
    if not one.prepare:
        raise ValueError(f"{one.name}: {one.where} does not say how to prepare it")
    if not source.exists():
        raise ValueError(f"{source}: does not exist; it must hold {one.prepare['source']}")
    path = root / one.file
    if one.prepare["layout"] == _SEED_TTS:
        _copy_seed_tts(one, source, path)
    else:
        _convert(one, source, root, path, workers)
    task = SeedTTS(str(one.language), speaker_prompt=True) if one.task == _SEED_TTS else TASKS[one.task]
    items = task.read(path, root)
    facts = {"benchmark": one.name, "items": len(items), "checksum": items_fingerprint(path, items)}
    write_json(_sidecar(path), facts | {"page": one.prepare["page"]})
    return facts


def prepared_checksum(path: Path) -> str | None:
    """The checksum of a set when it was prepared; None for one that was not prepared here."""
    if not _sidecar(path).is_file():
        return None
    facts = read_json(_sidecar(path))
    return str(facts["checksum"]) if isinstance(facts, dict) and "checksum" in facts else None


def _sidecar(path: Path) -> Path:
    return path.with_name(f"{path.name}.prepared.json")


def _convert(one: Benchmark, source: Path, root: Path, path: Path, workers: int) -> None:
    about = one.prepare
    patterns = [about["from"]] if isinstance(about["from"], str) else about["from"]
    part = Part(
        output=one.file,
        patterns=tuple(patterns),
        layout=about["layout"],
        languages=(),
        tasks=(one.task,) if one.task in ("asr", "tts") else (),
        normalise=tuple(about.get("normalise", ())),
        options={key: value for key, value in about.items() if key not in _ABOUT},
    )
    recipe = Recipe(one.name, one.name, about["page"], "see page", "", about["source"], (part,))
    (tally,) = prepare(
        recipe, source, root, Settings(clips="files", num_workers=workers, cleaning=KeepEverything())
    ).values()
    if tally.rejected:
        rejected = path.with_name(f"{path.name.removesuffix('.jsonl')}.rejected.jsonl")
        first = next(read_json_lines(rejected))
        path.unlink()
        raise SourceError(
            f"{source}: {tally.rejected.total()} of {tally.read} items of {one.name} cannot be used, so it would not "
            f"be whole; the first: {first['message']}; all: {rejected}"
        )


def _copy_seed_tts(one: Benchmark, source: Path, path: Path) -> None:
    """Copy a list and the recordings that it names, from the folder or the archive."""
    (pattern,) = one.prepare["from"]
    if source.is_file():
        with tarfile.open(source) as archive:
            members = {_below_language(member.name): member for member in archive if member.isfile()}

            def extract(name: str, target: Path) -> None:
                file = archive.extractfile(members[name]) if name in members else None
                if file is None:
                    raise SourceError(f"{source}: has no {name}; it must be {one.prepare['source']}")
                with whole_file(target) as temporary, temporary.open("wb") as copy:
                    shutil.copyfileobj(file, copy)

            _copy_list(pattern, path, extract)
        return
    found = matching(source, [pattern, f"*/{pattern}"])
    if not found:
        raise SourceError(f"{source}: has no {pattern}; it must be {one.prepare['source']}")
    base = found[0].parents[1]

    def copy(name: str, target: Path) -> None:
        if not (base / name).is_file():
            raise SourceError(f"{base / name}: no such file; the list names it")
        with whole_file(target) as temporary:
            shutil.copyfile(base / name, temporary)

    if base.resolve() != path.parents[1].resolve():
        _copy_list(pattern, path, copy)


def _copy_list(pattern: str, path: Path, copy: Callable[[str, Path], None]) -> None:
    """Copy the list, then what its third and fifth fields name, relative to its folder."""
    copy(pattern, path)
    folder = PurePosixPath(pattern).parent
    for line in path.read_text(encoding="utf-8-sig").splitlines():
        for name in _recordings(line.split("|")):
            if not (path.parent / name).is_file():
                copy((folder / name).as_posix(), path.parent / name)


def _recordings(fields: Sequence[str]) -> list[str]:
    names = [field.strip() for field in (*fields[2:3], *fields[4:5])]
    odd = next((name for name in names if name.startswith("/") or ".." in PurePosixPath(name).parts), None)
    if odd is not None:
        raise SourceError(f"{odd}: a list names its recordings relative to its folder")
    return [name for name in names if name]


def _below_language(name: str) -> str:
    """A member's path from the folder of its language."""
    parts = PurePosixPath(name).parts
    start = next((place for place, part in enumerate(parts) if part in _LANGUAGES), 0)
    return "/".join(parts[start:])
