"""The output folder of a run: its owner, its progress, and which runs may start in it.

One run at a time trains into a folder. Its first process holds a lock on the folder's ``.lock`` file. The kernel
releases the lock when the process ends for any reason, so a file left by a dead run does not block others. On NFS,
Linux forwards the lock to the server, which enforces it for all machines, unless the share is mounted with ``nolock``
or ``local_lock``: then it only excludes runs on the same machine.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import socket
from io import TextIOWrapper
from pathlib import Path

from vita_audio.training.checkpoints import (
    checkpoints,
    delete_checkpoint,
    is_complete,
    last_complete_checkpoint,
    steps_done,
)

logger = logging.getLogger(__name__)

FINISHED_MARKER = "stage.complete"
LOCK_FILE = ".lock"
_RESULT_SUFFIXES = (".json", ".safetensors", ".jinja", ".txt", ".md", ".model")
_RESULTS = (
    *(
        "config.json",
        "generation_config.json",
        "README.md",
        "run.json",
        "trainer_state.json",
        "training_args.bin",
    ),
    *(
        "tokenizer*",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "chat_template*",
    ),
    *("adapter_config.json", "adapter_model.safetensors"),
    *("model*.safetensors", "model.safetensors.index.json", "data_errors.jsonl", "runs"),
)


class RunFolderError(ValueError):
    """A folder that this run cannot use. The message gives the reason and what to do."""


class RunFolder:
    """The output folder of a run.

    Methods that change something must be called only by the first process. Leaving the context releases the
    folder to other runs.

    Args:
        path: the folder; created when it is locked.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock: TextIOWrapper | None = None

    def lock(self) -> None:
        """Lock the folder until the context is left or this process ends.

        Raises:
            RunFolderError: another running process owns it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        file = open(self.path / LOCK_FILE, "a+", encoding="utf-8")  # noqa: SIM115  (open as long as it is locked)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            file.close()
            raise RunFolderError(
                f"{self.path}: {owner} is training into this folder; wait for it, stop it, or give another --output_dir"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        self._lock = file

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def finished_steps(self) -> int | None:
        """Number of steps of the finished stage; None while it is not finished."""
        return steps_done(self.path) if (self.path / FINISHED_MARKER).is_file() else None

    def continue_from(self, max_steps: int) -> Path | None:
        """The checkpoint to continue from; None to start at the beginning. Changes nothing.

        Raises:
            RunFolderError: the stage is finished, more steps are requested, and no checkpoint is left.
        """
        checkpoint = last_complete_checkpoint(self.path)
        finished = self.finished_steps()
        if (
            finished is not None
            and (checkpoint is None or steps_done(checkpoint) < finished)
            and finished < max_steps
        ):
            raise RunFolderError(
                f"{self.path}: finished after {finished} steps, and no checkpoint is left to continue to "
                f"{max_steps}; give the folder as --model_name_or_path of a run into another folder"
            )
        return checkpoint

    def start_over(self) -> None:
        """Delete an earlier run's output: first its completion markers, then its checkpoints and results.

        Other files, such as logs and the user's own, are kept.
        """
        (self.path / FINISHED_MARKER).unlink(missing_ok=True)
        for checkpoint in reversed(checkpoints(self.path)):
            logger.info("--overwrite_output_dir: deleting %s", checkpoint)
            delete_checkpoint(checkpoint)
        for pattern in _RESULTS:
            for found in self.path.glob(pattern):
                shutil.rmtree(found) if found.is_dir() else found.unlink()

    def reopen(self) -> None:
        """Remove the mark of a finished stage, before it continues."""
        (self.path / FINISHED_MARKER).unlink(missing_ok=True)

    def take_result(self, checkpoint: Path) -> None:
        """Use the last checkpoint as the result, for a run that was stopped between the two."""
        for file in checkpoint.iterdir():
            if file.suffix in _RESULT_SUFFIXES:
                shutil.copy2(file, self.path)

    def finish(self) -> None:
        """Mark the result as complete."""
        (self.path / FINISHED_MARKER).touch()


def check_input_folder(model: str | Path, output_dir: str | Path) -> None:
    """Refuse as the input of a stage: an unfinished stage, an incomplete checkpoint, the stage's own output folder.

    Raises:
        RunFolderError: it is one of these.
    """
    model = Path(model)
    if model.resolve() == Path(output_dir).resolve():
        raise RunFolderError(
            f"--output_dir {output_dir}: is the folder of --model_name_or_path, whose weights would be overwritten; "
            "give another folder"
        )
    if checkpoints(model) and not (model / FINISHED_MARKER).is_file():
        whole = [folder for folder in checkpoints(model) if is_complete(folder)]
        instead = f", or give {whole[-1]}" if whole else ""
        raise RunFolderError(
            f"--model_name_or_path {model}: this stage is not finished; complete it first{instead}"
        )
    if (
        (model / "trainer_state.json").is_file()
        and (model / "loader_state").is_dir()
        and not is_complete(model)
    ):
        raise RunFolderError(
            f"--model_name_or_path {model}: this checkpoint was not written completely; give an earlier one"
        )
