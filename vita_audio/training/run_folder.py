"""The folder of one run: who owns it, what is finished in it, what may start in it.

One run at a time trains into a folder. Its first process holds a lock on ``.lock`` in it, which the kernel
releases when the process ends, however it ends; so a file that a dead run left blocks nobody. On NFS Linux turns
the lock into one that the server keeps for all machines, except where the share is mounted with ``nolock`` or
``local_lock``: there it guards against runs on the same machine only.
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
    *("model*.safetensors", "model.safetensors.index.json", "data_errors.jsonl", "runs"),
)


class RunFolderError(ValueError):
    """A folder that this run cannot use. The message says why and what to do."""


class RunFolder:
    """An output folder, from its run's point of view.

    All methods that change something are for the first process alone. Leaving the context lets another run
    have the folder.

    Args:
        path: made on locking.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock: TextIOWrapper | None = None

    def lock(self) -> None:
        """Own the folder until the context is left or this process ends.

        Raises:
            RunFolderError: a run that is still going owns it.
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
        """Steps of the finished stage; None while it is not finished."""
        return steps_done(self.path) if (self.path / FINISHED_MARKER).is_file() else None

    def continue_from(self, max_steps: int) -> Path | None:
        """The checkpoint to go on from; None to start at the beginning. Changes nothing.

        Raises:
            RunFolderError: the stage is finished, more steps are wanted, and no checkpoint is left.
        """
        checkpoint = last_complete_checkpoint(self.path)
        finished = self.finished_steps()
        if (
            finished is not None
            and (checkpoint is None or steps_done(checkpoint) < finished)
            and finished < max_steps
        ):
            raise RunFolderError(
                f"{self.path}: finished after {finished} steps, and no checkpoint of them is left to make "
                f"{max_steps}; give the folder as --model_name_or_path of a run into another folder"
            )
        return checkpoint

    def start_over(self) -> None:
        """Delete what an earlier run left: first what says that it is whole, then checkpoints and results.

        Other files stay, such as logs and the user's own.
        """
        (self.path / FINISHED_MARKER).unlink(missing_ok=True)
        for checkpoint in reversed(checkpoints(self.path)):
            logger.info("--overwrite_output_dir: deleting %s", checkpoint)
            delete_checkpoint(checkpoint)
        for pattern in _RESULTS:
            for found in self.path.glob(pattern):
                shutil.rmtree(found) if found.is_dir() else found.unlink()

    def reopen(self) -> None:
        """Take back that the stage is finished, before it goes on."""
        (self.path / FINISHED_MARKER).unlink(missing_ok=True)

    def take_result(self, checkpoint: Path) -> None:
        """Make the last checkpoint the result, for a run that was stopped between the two."""
        for file in checkpoint.iterdir():
            if file.suffix in _RESULT_SUFFIXES:
                shutil.copy2(file, self.path)

    def finish(self) -> None:
        """Say that the result is whole."""
        (self.path / FINISHED_MARKER).touch()


def check_input_folder(model: str | Path, output_dir: str | Path) -> None:
    """Refuse an earlier stage that is not finished, a checkpoint that is not whole, and the stage's own output folder
    as the input of a stage.

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
            f"--model_name_or_path {model}: this stage is not finished; run it to its end first{instead}"
        )
    if (
        (model / "trainer_state.json").is_file()
        and (model / "loader_state").is_dir()
        and not is_complete(model)
    ):
        raise RunFolderError(
            f"--model_name_or_path {model}: this checkpoint was not written to its end; give an earlier one"
        )
