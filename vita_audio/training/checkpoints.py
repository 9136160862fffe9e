"""Complete checkpoints, with the loader's position in the data.

A run may be killed while it saves. Each rank writes its part; when all are done, rank 0 adds a marker
file. Only marked checkpoints are resumed from, and old ones are deleted only after the new one
is marked.
"""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path
from typing import Any

from vita_audio.files import read_json, write_json

logger = logging.getLogger(__name__)

COMPLETE_MARKER = "checkpoint.complete"
LOADER_STATE_FOLDER = "loader_state"
_CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")


class CheckpointStateError(ValueError):
    """A checkpoint that this run cannot continue from. The message gives the reason and what to do."""


def last_complete_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest complete checkpoint of a run; None if there is none."""
    newest = None
    for folder in checkpoints(output_dir):
        if is_complete(folder):
            newest = folder
        else:
            logger.warning("%s was not written completely and is skipped", folder)
    return newest


def checkpoints(output_dir: str | Path) -> list[Path]:
    """All checkpoint folders of a run, complete or not, in the order of their steps."""
    found = [
        (step, folder)
        for folder in Path(output_dir).glob("checkpoint-*")
        if (step := checkpoint_step(folder)) is not None and folder.is_dir()
    ]
    return [folder for _, folder in sorted(found)]


def checkpoint_step(folder: str | Path) -> int | None:
    """The step in a checkpoint folder's name; None for any other name."""
    match = _CHECKPOINT_NAME.fullmatch(Path(folder).name)
    return None if match is None else int(match[1])


def is_complete(checkpoint: str | Path) -> bool:
    """Whether every rank has written its part."""
    return (Path(checkpoint) / COMPLETE_MARKER).is_file()


def mark_complete(checkpoint: str | Path) -> None:
    """Mark a checkpoint as complete: every rank has written its part. Call on one rank, after a barrier."""
    (Path(checkpoint) / COMPLETE_MARKER).touch()


def mark_incomplete(checkpoint: str | Path) -> None:
    """Remove the marker and loader states before a checkpoint is rewritten. Call on one rank, with a barrier after."""
    (Path(checkpoint) / COMPLETE_MARKER).unlink(missing_ok=True)
    shutil.rmtree(Path(checkpoint) / LOADER_STATE_FOLDER, ignore_errors=True)


def delete_old_checkpoints(output_dir: str | Path, keep: int | None) -> None:
    """Keep the newest complete checkpoints. Call on one rank, after the newest is marked.

    Incomplete ones are always deleted: this run owns the folder and is not writing to them.

    Args:
        output_dir: the run's folder.
        keep: number of complete checkpoints to keep, at least 1; None or 0 keeps all.
    """
    folders = checkpoints(output_dir)
    whole = [folder for folder in folders if is_complete(folder)]
    kept = whole[-keep:] if keep else whole
    for folder in folders:
        if folder not in kept:
            delete_checkpoint(folder)


def delete_checkpoint(checkpoint: Path) -> None:
    """Delete a checkpoint; if interrupted, what remains counts as incomplete."""
    (checkpoint / COMPLETE_MARKER).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


def steps_done(folder: str | Path) -> int:
    """Number of optimizer steps of a checkpoint or a stage's result.

    Raises:
        CheckpointStateError: ``trainer_state.json`` is missing or damaged.
    """
    try:
        return int(read_json(Path(folder) / "trainer_state.json")["global_step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointStateError(
            f"{folder}/trainer_state.json: does not state the number of steps ({error}); "
            "restore the file, or train into an empty folder"
        ) from error


def save_loader_state(checkpoint: str | Path, rank: int, state: dict[str, Any]) -> None:
    """Write one rank's loader state, which is plain JSON, into a checkpoint."""
    write_json(Path(checkpoint) / LOADER_STATE_FOLDER / f"rank_{rank:05d}.json", state, indent=None)


def load_loader_states(checkpoint: str | Path) -> list[dict[str, Any]]:
    """Loader states of all ranks that wrote a checkpoint, in rank order.

    Raises:
        CheckpointStateError: the checkpoint has no readable loader states, so the data cannot be continued.
    """
    folder = Path(checkpoint) / LOADER_STATE_FOLDER
    files = sorted(folder.glob("rank_*.json"))
    if not files:
        problem = (
            "was written by an earlier version, which pickled the position in the data"
            if any(folder.glob("rank_*.pt"))
            else f"has no {LOADER_STATE_FOLDER}/, so the position in the data is unknown"
        )
        raise CheckpointStateError(
            f"{checkpoint} {problem}; start the stage in an empty folder, "
            "or give this checkpoint as --model_name_or_path of a new run"
        )
    try:
        return [read_json(file) for file in files]
    except (OSError, ValueError) as error:
        raise CheckpointStateError(
            f"{error}; delete {checkpoint} to continue from the one before it"
        ) from error


def writers(checkpoint: str | Path) -> int:
    """The number of processes that wrote a checkpoint."""
    return len(list((Path(checkpoint) / LOADER_STATE_FOLDER).glob("rank_*")))
