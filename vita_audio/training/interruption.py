"""A run that is asked to stop, saves by the clock, or hangs.

* SIGTERM and SIGUSR1, which clusters send before they take a machine away, save a checkpoint after the current
  step and end the run with :data:`REQUEUE`. Any process may get the signal; all of them agree after each step.
* ``--save_at MINUTES`` also saves whenever so many minutes have passed.
* ``--hang_minutes MINUTES``: a process that finishes no micro-batch and no save for so long prints the stack of each
  of its threads and ends. In a hang all processes wait, so each prints its own, and the launcher ends the run.
"""

from __future__ import annotations

import faulthandler
import logging
import signal
import sys
import time
from types import FrameType
from typing import Any

import torch
from torch import distributed
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

REQUEUE = 75
"""Exit status of a run that was asked to stop and has saved: EX_TEMPFAIL of sysexits.h. Start it again to go on."""
_NOTHING, _SAVE, _STOP = 0, 1, 2


class Interruption(TrainerCallback):
    """Saves and stops when asked to, and saves by the clock.

    Args:
        save_at: minutes between two saves. None: as ``--save_steps`` says.

    Attributes:
        stopped_by: name of the signal that has stopped the run; None if none has.
    """

    def __init__(self, save_at: float | None) -> None:
        self.stopped_by: str | None = None
        self._received: str | None = None
        self._save_seconds = None if save_at is None else 60 * save_at
        self._saved = time.monotonic()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._saved = time.monotonic()
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._receive)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        wanted = self._agree(args.device)
        if wanted >= _SAVE:
            control.should_save = True
        if wanted == _STOP and state.global_step < state.max_steps:
            self.stopped_by = self._received or "a signal to another process"
            control.should_training_stop = True

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._saved = time.monotonic()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = signal.Signals(number).name

    def _agree(self, device: torch.device) -> int:
        """The most that any process wants."""
        due = self._save_seconds is not None and time.monotonic() - self._saved >= self._save_seconds
        mine = _STOP if self._received else _SAVE if due else _NOTHING
        if not distributed.is_initialized() or distributed.get_world_size() == 1:
            return mine
        wanted = torch.tensor(mine, device=device)
        distributed.all_reduce(wanted, op=distributed.ReduceOp.MAX)
        return int(wanted)


class HangDump(TrainerCallback):
    """Ends a process that makes no progress, after printing the stacks of its threads to standard error.

    Args:
        minutes: the longest time between two signs of progress.
    """

    def __init__(self, minutes: float) -> None:
        self._seconds = 60 * minutes

    def _progress(self, *_: Any, **__: Any) -> None:
        # The timer is a thread of C: it also fires when Python itself is stuck in a call.
        if sys.__stderr__ is not None:
            faulthandler.dump_traceback_later(self._seconds, exit=True, file=sys.__stderr__)

    on_train_begin = on_step_begin = on_substep_end = on_step_end = on_save = on_log = _progress

    def on_train_end(self, *_: Any, **__: Any) -> None:
        faulthandler.cancel_dump_traceback_later()
