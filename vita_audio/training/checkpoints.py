"""Checkpoints that can be trusted: whole, with the loader's place in the data.

A run may be killed while it saves. Each rank writes its part; when all have, rank 0 adds a marker
file. Only marked checkpoints are resumed from, and old ones are deleted only after the new one
is marked.
"""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)

COMPLETE_MARKER = "checkpoint.complete"
LOADER_STATE_FOLDER = "loader_state"
_CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)$")


def last_complete_checkpoint(output_dir: str | Path) -> Path | None:
    """Newest checkpoint of a run that was written to its end; None when there is none."""
    newest, newest_step = None, -1
    for folder in Path(output_dir).glob("checkpoint-*"):
        match = _CHECKPOINT_NAME.search(folder.name)
        if match is None or not folder.is_dir():
            continue
        if not (folder / COMPLETE_MARKER).is_file():
            logger.warning("%s was not written to its end and is passed over", folder)
        elif int(match[1]) > newest_step:
            newest, newest_step = folder, int(match[1])
    return newest


def mark_complete(checkpoint: str | Path) -> None:
    """Say that every rank has written its part. Call on one rank, after a barrier."""
    (Path(checkpoint) / COMPLETE_MARKER).touch()


def mark_incomplete(checkpoint: str | Path) -> None:
    """Take away the marker, and loader states that ranks of another run left, before a checkpoint is written
    again. Call on one rank, with a barrier after it.
    """
    (Path(checkpoint) / COMPLETE_MARKER).unlink(missing_ok=True)
    shutil.rmtree(Path(checkpoint) / LOADER_STATE_FOLDER, ignore_errors=True)


def save_loader_state(checkpoint: str | Path, rank: int, state: dict[str, Any]) -> None:
    """Write one rank's loader state into a checkpoint."""
    folder = Path(checkpoint) / LOADER_STATE_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / f"rank_{rank:05d}.pt")


def load_loader_states(checkpoint: str | Path) -> list[dict[str, Any]]:
    """Loader states of all ranks that wrote a checkpoint, in rank order.

    Raises:
        FileNotFoundError: the checkpoint has none, so the data could not be continued.
    """
    files = sorted((Path(checkpoint) / LOADER_STATE_FOLDER).glob("rank_*.pt"))
    if not files:
        raise FileNotFoundError(
            f"{checkpoint}: no {LOADER_STATE_FOLDER}/, so the place in the data is unknown; "
            "resume from another checkpoint or start the stage in an empty folder"
        )
    return [torch.load(file, weights_only=False) for file in files]
