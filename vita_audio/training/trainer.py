"""transformers' Trainer with four changes: our rows, parameter groups, exact resumption and checked steps.

* Rows come from the data engine, which shards and shuffles them; every checkpoint includes its
  state, so a resumed run sees the same rows as an uninterrupted one.
* Heads can have their own learning rate. Their losses, accuracies and more are logged (``watching.py``).
* A resumed run uses its own options: the checkpoint provides weights, moments and counters.
* A loss that is not finite stops the run before the update, and so do ten skipped steps in a row.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import (
    PreTrainedModel,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations import TensorBoardCallback
from transformers.trainer_utils import TrainOutput

from vita_audio.data.faults import MachineError, first_line, machine_fault
from vita_audio.data.validation import ValidationSet
from vita_audio.files import write_json
from vita_audio.models.compat import before_update
from vita_audio.provenance import RUN_FILE
from vita_audio.training.arguments import StageArguments
from vita_audio.training.callbacks import (
    Continue,
    ContinuedProgress,
    ContinuedTensorBoard,
    StopOnBadGradients,
    Trace,
)
from vita_audio.training.checkpoints import (
    CheckpointStateError,
    checkpoint_step,
    delete_old_checkpoints,
    last_complete_checkpoint,
    mark_complete,
    mark_incomplete,
    save_loader_state,
)
from vita_audio.training.compilation import compile_layers, not_compiled
from vita_audio.training.continuation import PlannedRates
from vita_audio.training.interruption import HangDump, Interruption
from vita_audio.training.model_card import write_model_card
from vita_audio.training.optimizers import build_optimizer
from vita_audio.training.recomputation import RecomputeFirst
from vita_audio.training.scheduler import build_scheduler
from vita_audio.training.stages import parameter_groups
from vita_audio.training.straggler import Straggler
from vita_audio.training.validation import Speaker, listen, score
from vita_audio.training.watching import CountingLoader, TimedLoader, Watch

_TORCH_WRITER = re.compile("inline_container|PytorchStreamWriter")
"""Part of torch.save's message when it cannot write; the error has no type of its own."""


class SpeechTrainer(Trainer):
    """Trains one stage.

    Args:
        loader: this rank's rows, positioned where the run starts or continues.
        run: the content of ``run.json``; it is added to every checkpoint and to the model card.
        validation: scored every ``--eval_steps``; None: nothing is.
        speaker: answers requests aloud at each validation; None: nobody does.
        checkpointed_layers: how many layers recompute their activations, with gradient checkpointing; None: all.
        **kwargs: the Trainer's own arguments, including ``model``.
    """

    args: StageArguments
    model: PreTrainedModel
    lr_scheduler: Any  # any scheduler; the Trainer's annotation allows one kind only

    def __init__(
        self,
        *,
        loader: CountingLoader,
        run: Mapping[str, Any] | None = None,
        validation: ValidationSet | None = None,
        speaker: Speaker | None = None,
        checkpointed_layers: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(eval_dataset=None if validation is None else validation.batches, **kwargs)
        if self.args.torch_compile:
            compile_layers(
                self.model, self.args.torch_compile_backend or "inductor", self.args.torch_compile_mode
            )
        self._validation = validation
        self._speaker = speaker
        self._board: ContinuedTensorBoard | None = None
        # The Trainer disables the cache; users of the result need it, and a pass with labels keeps none anyway.
        self.model.config.use_cache = True
        self._loader = loader
        self._run = run
        self._planned_rates: list[PlannedRates] = []
        # We delete old checkpoints ourselves: the Trainer would do so before the new one is complete.
        self._checkpoints_to_keep, self.args.save_total_limit = self.args.save_total_limit, None
        self._watch = Watch(
            self.model,
            loader,
            self.args.gradient_accumulation_steps,
            self.args.device,
            global_mean=self.args.loss_average == "global",
        )
        self._lines = _LoggedSteps(self)
        self.add_callback(self._lines)
        self._straggler = Straggler(self.args.device)
        self.add_callback(Continue(lambda: self._loader.counts()["epoch"]))
        self.add_callback(
            StopOnBadGradients(lambda: self.model_wrapped if self.is_deepspeed_enabled else None)
        )
        self._interruption = Interruption(self.args.save_at)
        self.add_callback(self._interruption)
        if self.args.hang_minutes:
            self.add_callback(HangDump(self.args.hang_minutes))
        if checkpointed_layers is not None:
            self.add_callback(RecomputeFirst(checkpointed_layers))
        if self.args.trace_steps:
            self.add_callback(Trace(self.args.trace_steps))
        for theirs, ours in (
            (ProgressCallback, ContinuedProgress),
            (TensorBoardCallback, ContinuedTensorBoard),
        ):
            if self.pop_callback(theirs) is not None:
                callback = ours()
                self.add_callback(callback)
                if isinstance(callback, ContinuedTensorBoard):
                    self._board = callback

    def create_accelerator_and_postprocess(self) -> None:
        """Layers are compiled here; accelerate would compile the whole model."""
        with self.args.without_compilation():
            super().create_accelerator_and_postprocess()

    @property
    def stopped_by(self) -> str | None:
        """The signal after which the run has saved and stopped early; None if none came."""
        return self._interruption.stopped_by

    # -- data ---------------------------------------------------------------------------------------------

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """Train to ``max_steps``, from the start or from a complete checkpoint's folder.

        Raises:
            CheckpointStateError: the checkpoint cannot be loaded.
        """
        if resume_from_checkpoint is None:
            return super().train(None, *args, **kwargs)
        # The Trainer restores random states (of dropout) only where it skips batches itself.
        loaded = _ObeyArguments(
            self._planned_rates, lambda: self._load_rng_state(str(resume_from_checkpoint))
        )
        self.add_callback(loaded)
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        except Exception as error:  # any error while the checkpoint is being read
            if loaded.reached or isinstance(error, CheckpointStateError) or machine_fault(error) is not None:
                raise
            raise CheckpointStateError(
                f"{resume_from_checkpoint}: cannot be loaded: {first_line(error)}; "
                "delete it to continue from the one before it"
            ) from error

    def get_train_dataloader(self) -> Any:  # the Trainer's signature expects a DataLoader
        """This rank's loader, which shards and shuffles itself; the time that it is waited for is noted."""
        return _Rows(self._watch.batches, self._straggler)

    # -- optimizer ----------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with a separate rate for the heads; used if the DeepSpeed config builds no optimizer."""
        if self.optimizer is None:
            trained: Any = self.model if model is None else model
            groups = parameter_groups(
                trained,
                self.args.learning_rate,
                self.args.weight_decay,
                self.args.mtp_learning_rate_multiplier,
                decay_norms=self.args.decay_norms,
            )
            self.optimizer = build_optimizer(
                self.args.optim,
                groups,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                eps=self.args.adam_epsilon,
                device=self.args.device,
            )
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> LRScheduler:
        """The schedule of ``--lr_scheduler_type``; DeepSpeed also calls this when it builds the optimizer.

        The planned rates are recorded, since a checkpoint would replace them.
        """
        if self.lr_scheduler is None:
            if optimizer is None:
                optimizer = self.create_optimizer()
            scheduler = build_scheduler(
                self.args.lr_scheduler_type,
                optimizer,
                self.args.get_warmup_steps(num_training_steps),
                num_training_steps,
                self.args.scheduler_arguments,
            )
            self._created_lr_scheduler = True
            self._planned_rates[:] = [PlannedRates(scheduler)]
            self.lr_scheduler = cast(LambdaLR, scheduler)  # the base class annotates every scheduler this way
        return self.lr_scheduler

    # -- loss ---------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The model's loss; its parts and predictions are kept for the log.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        kinds = inputs.pop("kinds", None)
        inputs["return_predictions"] = True
        with self._straggler.working():
            loss, outputs = super().compute_loss(
                model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
            )
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"loss is {loss.item()} at step {self.state.global_step + 1} on rank {self.args.process_index}; "
                "stopped before the update. Lower --learning_rate, or look at the rows of this step with "
                "tools/inspect_data.py; the run continues from its last checkpoint"
            )
        if model.training:
            self._watch.add(outputs, kinds)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what :class:`vita_audio.training.watching.Watch` has seen to a training log line."""
        if "loss" in logs:
            steps = self._lines.steps_since_last()
            logs.update(
                self._watch.columns(
                    logs,
                    self.lr_scheduler.get_last_lr(),
                    steps=steps,
                    detailed=self._lines.is_detailed(),
                )
            )
            self._straggler.report(self.state.global_step, max(1, steps))
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Score the validation set, and have requests answered aloud."""
        assert self._validation is not None, "eval_strategy is set with a validation set only"
        with self._watch.paused(), not_compiled() if self.args.torch_compile else nullcontext():
            metrics = score(self.model, self._validation, self.args.device)
            if self._speaker is not None:
                answers, rates = listen(self.model, self._speaker)
                metrics |= rates
                if self._board is not None:
                    self._board.show(answers, self.state.global_step)
            self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # -- checkpoints --------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Save a self-contained folder: weights, config, tokenizer, model card."""
        folder = output_dir or self.args.output_dir
        with _writing(folder):
            super().save_model(output_dir, *args, **kwargs)
            if self.args.should_save:
                write_model_card(folder, self._run)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        with _writing(folder), self._watch.paused():
            self._write_checkpoint(folder, model, trial)

    def _write_checkpoint(self, folder: Path, model: nn.Module, trial: Any) -> None:
        if self.args.should_save:
            mark_incomplete(folder)
        self.accelerator.wait_for_everyone()
        save_loader_state(folder, self.args.process_index, self._loader.state_dict())
        super()._save_checkpoint(model, trial)
        if self.args.should_save and self._run is not None:
            write_json(folder / RUN_FILE, self._run)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            mark_complete(folder)
            delete_old_checkpoints(self.args.output_dir, self._checkpoints_to_keep)


@contextmanager
def _writing(folder: str | Path) -> Iterator[None]:
    """Report a failed or full disk in one line.

    Raises:
        MachineError: the folder cannot be written.
    """
    try:
        yield
    except MachineError:
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _TORCH_WRITER.search(str(error)):
            raise
        run = Path(folder).parent if checkpoint_step(folder) is not None else Path(folder)
        whole = last_complete_checkpoint(run)
        raise MachineError(
            f"{folder}: cannot be written: {first_line(error)}; free some space there and start the stage "
            f"again; it continues from {'the beginning' if whole is None else f'{whole.name}, which is whole'}"
        ) from error


class _Rows:
    """The loader, with the time spent on waiting for it counted."""

    def __init__(self, loader: TimedLoader, straggler: Straggler) -> None:
        self._loader = loader
        self._straggler = straggler

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self._straggler.rows(self._loader)


class _ObeyArguments(TrainerCallback):
    """After a checkpoint is loaded and before the first step: restores this run's rates and the random states."""

    def __init__(self, planned: list[PlannedRates], load_random_states: Callable[[], None]) -> None:
        self._planned = planned
        self._load_random_states = load_random_states
        self._continued = False
        self.reached = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.reached = True
        for rates in self._planned:
            rates.restore()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self._continued:  # not earlier: the loader draws a seed when it starts
            self._continued = True
            self._load_random_states()


class _LoggedSteps(TrainerCallback):
    """Which steps are logged, and has their gradients noted.

    Args:
        trainer: whose gradients.
    """

    def __init__(self, trainer: SpeechTrainer) -> None:
        self._trainer = trainer
        self._logged = self._detailed = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._logged = self._detailed = state.global_step
        self._trainer._watch.start()
        if self._trainer.is_deepspeed_enabled:
            engine = self._trainer.model_wrapped
            before_update(engine, lambda: self._note(engine))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self._trainer.is_deepspeed_enabled:
            self._note(None)

    def _note(self, engine: Any) -> None:
        state = self._trainer.state
        step = state.global_step + 1
        if (
            step % state.logging_steps == 0
            or step == state.max_steps
            or (step == 1 and self._trainer.args.logging_first_step)
        ):
            self._trainer._watch.add_gradients(engine)

    def steps_since_last(self) -> int:
        """Steps since the last line."""
        now = self._trainer.state.global_step
        steps, self._logged = now - self._logged, now
        return steps

    def is_detailed(self) -> bool:
        """Whether the line is the first after ``--detail_steps`` more steps, or the last."""
        state, every = self._trainer.state, self._trainer.args.detail_steps
        every = math.ceil(every * state.max_steps) if every < 1 else every
        now = state.global_step
        if now < state.max_steps and now - self._detailed < every:
            return False
        self._detailed = now
        return True
