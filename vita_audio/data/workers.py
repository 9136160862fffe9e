"""The processes of the training loader: their threads, and their end."""

from __future__ import annotations

import multiprocessing
import os
import threading

import torch


def set_up_worker(_worker: int) -> None:
    """Prepare a worker that torch has just started."""
    torch.set_num_threads(1)  # one core per worker; the other cores are for the other workers and the trainer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_leave_with_the_trainer, daemon=True).start()


def _leave_with_the_trainer() -> None:
    """End this worker when the trainer has exited.

    torch's own watchdog watches the parent process. Here that is the fork server, which waits for its
    workers: after a trainer is killed, neither would end.
    """
    trainer = multiprocessing.parent_process()
    if trainer is not None:
        trainer.join()
        os._exit(1)
