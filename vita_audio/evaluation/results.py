"""Scores on disk, reused while all of their inputs are unchanged.

The scores of a test set are stored next to its utterances, in ``NAME_scores.json``, with a fingerprint of everything
that affects them: the content of the test set and its recordings, of checkpoint, codec, recogniser and grammar, and
the settings. Paths are not included, so replaced files are detected and folders may be moved.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from vita_audio.audio.archives import read_file
from vita_audio.distributed import gather_objects, is_first
from vita_audio.evaluation.items import BenchmarkItem
from vita_audio.files import content_fingerprint, read_json, write_json

_CHECKPOINT_FILES = (
    "*.safetensors",
    "*.bin",
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "*token*.json",
    "vocab*",
    "merges.txt",
)
_COUNTING = 4
"""Increased when the same replies would get different scores, so older scores are not reused."""


def keep_scores(
    folder: Path, name: str, fingerprint: str, compute: Callable[[], Mapping[str, Any]]
) -> dict[str, Any]:
    """The scores in ``folder/NAME_scores.json`` if they have this fingerprint and no item failed; else computes them.

    All processes must call it; the file that the first process reads decides.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / f"{name}_scores.json"
    kept = gather_objects(read_scores(path) if is_first() else None)[0]
    if kept is not None and kept.get("fingerprint") == fingerprint and not kept.get("failed"):
        return kept
    scores = {"fingerprint": fingerprint, **compute()}
    if is_first():
        write_json(path, scores)
    return scores


def read_scores(path: Path) -> dict[str, Any] | None:
    """An earlier run's scores; None if there are none.

    Raises:
        ValueError: the file is damaged.
    """
    if not path.is_file():
        return None
    try:
        scores = read_json(path)
    except ValueError as error:
        raise ValueError(f"{error}; delete the file to score again") from error
    if not isinstance(scores, dict):
        raise ValueError(f"{path}: holds no scores; delete the file to score again")
    return scores


def fingerprint_of(*facts: Any) -> str:
    """A short digest of facts that can be written as JSON or as text."""
    text = json.dumps([_COUNTING, *facts], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def checkpoint_fingerprint(folder: Path) -> str:
    """A digest of weights, configuration and tokenizer."""
    return content_fingerprint(
        sorted({file for pattern in _CHECKPOINT_FILES for file in folder.glob(pattern)})
    )


def folder_fingerprint(path: str | Path | None) -> str | None:
    """A digest of the content of all files below a folder; None for no folder."""
    if path is None or not Path(path).exists():
        return None
    files = [file for file in Path(path).rglob("*") if file.is_file() and not file.name.startswith(".")]
    return content_fingerprint(sorted(files) or [Path(path)])


def items_fingerprint(path: Path, items: Iterable[BenchmarkItem]) -> str:
    """A digest of a test set's bytes, of the selected items and of their recordings."""
    digest = hashlib.sha256(path.read_bytes())
    for item in items:
        digest.update(json.dumps(item.id).encode())
        for audio in (*item.conversation.audios, item.reference_audio):
            if isinstance(audio, str):
                digest.update(hashlib.sha256(read_file(audio)).digest())
    return digest.hexdigest()[:16]
