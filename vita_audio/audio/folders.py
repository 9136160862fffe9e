"""Identifies the kind of weights in a folder by its small files, so mistakes are found on opening."""

from __future__ import annotations

import json
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

GLM4VOICE_TOKENIZER = "GLM-4-Voice tokenizer"
GLM4VOICE_DECODER = "GLM-4-Voice decoder"
MEL_VQ = "mel_vq codec"
SENSEVOICE = "SenseVoice model"


class WeightsError(ValueError):
    """Weights that are missing, damaged or for another model; the message names folder or file and the fault."""


def check_folder(
    folder: str | PathLike[str], wanted: str, kind: str, files: Sequence[str | tuple[str, ...]]
) -> Path:
    """Refuse a folder that cannot be opened as ``wanted``; reads a few kilobytes at most.

    Args:
        folder: the folder to check.
        wanted: one of the names above.
        kind: kind of the codec that is being opened, for messages.
        files: the required files; one file of a tuple is enough.

    Raises:
        WeightsError: the folder does not exist, holds something else, lacks a file, or a file is truncated.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise WeightsError(f"{folder}: no such folder; the {kind} codec needs the folder of a {wanted}")
    found = identify_folder(folder)
    if found is not None and found != wanted:
        raise WeightsError(f"{folder}: holds a {found}, not a {wanted}, which the {kind} codec needs here")
    for names in files:
        names = (names,) if isinstance(names, str) else names
        present = [folder / name for name in names if (folder / name).is_file()]
        if not present:
            raise WeightsError(
                f"{folder}: no {' or '.join(names)} there; the {kind} codec needs the folder of a {wanted}"
            )
        if present[0].suffix == ".safetensors":
            _check_whole(present[0], kind)
    return folder


def identify_folder(folder: Path) -> str | None:
    """The kind of a folder, judging by its files; None if unknown."""
    config = _read_json(folder / "config.json")
    if config.get("kind") == "mel_vq":
        return MEL_VQ
    if "quantize_vocab_size" in config:
        return GLM4VOICE_TOKENIZER
    if any(
        (folder / name).is_file() for name in ("flow.pt", "flow.safetensors", "hift.pt", "hift.safetensors")
    ):
        return GLM4VOICE_DECODER
    if (folder / "am.mvn").is_file():
        return SENSEVOICE
    if "model_type" in config:
        return f"{config['model_type']} model"
    return None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _check_whole(path: Path, kind: str) -> None:
    """Compare a safetensors file's header with its length."""
    try:
        with safe_open(path, "pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"{path}: cut off or damaged, not a {kind} codec that can be opened: {error}"
        ) from error
