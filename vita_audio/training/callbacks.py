"""Trainer callbacks: detection of skipped steps, and displays that continue across restarts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback

from vita_audio.training.validation import Spoken

MOST_SKIPPED_STEPS = 10
"""A loss scale that is too high skips a few steps at the start; more skipped steps mean a broken run."""


class StopOnBadGradients(TrainerCallback):
    """Stops a run whose gradients are not finite: after ten skipped steps in a row, or after one applied update.

    Args:
        deepspeed: returns the DeepSpeed engine; None without DeepSpeed.
    """

    def __init__(self, deepspeed: Callable[[], Any]) -> None:
        self._deepspeed = deepspeed
        self._skipped = 0
        self._made = 0
        self._bad = False

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._deepspeed() is None:
            parameters: list[nn.Parameter] = list(kwargs["model"].parameters())
            gradients = [p.grad for p in parameters if p.grad is not None]
            finite = [torch.isfinite(gradient).all() for gradient in gradients]
            self._bad = bool(finite) and not bool(torch.stack(finite).all())
            if self._bad:
                for parameter in parameters:
                    parameter.grad = None  # the optimizer skips it

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        engine = self._deepspeed()
        if engine is not None:
            self._bad = not engine.was_step_applied()
            norm = engine.get_global_grad_norm()
            # DeepSpeed's ZeRO reports -1 for a norm that is not finite.
            if not self._bad and norm is not None and not (math.isfinite(norm) and norm >= 0):
                raise FloatingPointError(
                    f"the gradients of step {state.global_step} are not finite, and the update was applied; "
                    "nothing has been saved since. Lower --learning_rate; the run continues from its last checkpoint"
                )
        self._skipped = self._skipped + 1 if self._bad else 0
        self._made += not self._bad
        if not self._made and state.global_step >= state.max_steps:
            raise FloatingPointError(
                "every step was skipped because its gradients are not finite, so nothing was learned; "
                "train in bfloat16 or float32, or lower --learning_rate"
            )
        if self._skipped == MOST_SKIPPED_STEPS:
            raise FloatingPointError(
                f"{MOST_SKIPPED_STEPS} steps in a row, up to step {state.global_step}, were skipped because their "
                "gradients are not finite; train in bfloat16 or float32, or lower --learning_rate. "
                "The run continues from its last checkpoint"
            )


class Continue(TrainerCallback):
    """Uses this run's intervals instead of the checkpoint's, and counts epochs by the loader's position.

    Args:
        epoch: passes over the data so far.
    """

    def __init__(self, epoch: Callable[[], float]) -> None:
        self._epoch = epoch

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        state.compute_steps(args, state.max_steps)
        state.epoch = self._epoch()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        state.epoch = self._epoch()


class ContinuedProgress(ProgressCallback):
    """A progress bar whose rate and remaining time count only the steps of this run."""

    training_bar: Any  # its type is None in the base class

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self.training_bar = tqdm(total=state.max_steps, initial=state.global_step, dynamic_ncols=True)
        self.current_step = state.global_step


class ContinuedTensorBoard(TensorBoardCallback):
    """All of a folder's runs in one TensorBoard run, ``OUTPUT_DIR/runs``.

    Steps after the checkpoint, which a stopped run logged and this run repeats, are shown once.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and self.tb_writer is None:
            from torch.utils.tensorboard import SummaryWriter

            folder = self.logging_dir or f"{args.output_dir}/runs"
            redone = state.global_step + 1 if state.global_step else None
            self.tb_writer = SummaryWriter(log_dir=folder, purge_step=redone)
        super().on_train_begin(args, state, control, **kwargs)

    def show(self, answers: Sequence[Spoken], step: int) -> None:
        """Add answers of a validation as sound and text; only the first process has a TensorBoard."""
        if self.tb_writer is None:
            return
        for answer in answers:
            self.tb_writer.add_text(f"eval/{answer.name}", answer.text, step)
            if answer.waveform is not None:
                sound = answer.waveform.float().clamp(-1, 1)[None]
                self.tb_writer.add_audio(f"eval/{answer.name}", sound, step, answer.sample_rate)


class Trace(TrainerCallback):
    """Writes a trace of some steps, ``OUTPUT_DIR/trace-RANK.json``, for chrome://tracing and Perfetto.

    The first two steps of a run are left out: they allocate and tune. "wait for data" is the time in which the
    trainer stands still for its loader, "step" one optimizer step.

    Args:
        steps: how many.
    """

    _LEFT_OUT = 2

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._seen = 0
        self._profiler: Any = None
        self._step: Any = None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._profiler is not None:
            self._step = torch.profiler.record_function("step")
            self._step.__enter__()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._step is not None:
            self._step.__exit__(None, None, None)
            self._step = None
        self._seen += 1
        if self._seen == self._LEFT_OUT:
            self._profiler = torch.profiler.profile()
            self._profiler.start()
        elif self._seen == self._LEFT_OUT + self._steps:
            self._write(args)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._write(args)

    def _write(self, args: TrainingArguments) -> None:
        if self._profiler is None:
            return
        self._profiler.stop()
        self._profiler.export_chrome_trace(f"{args.output_dir}/trace-{args.process_index}.json")
        self._profiler = None
