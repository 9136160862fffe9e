"""transformers' Trainer with three changes: our rows, our groups, checkpoints that resume exactly.

* Rows come from the data engine, which shards and shuffles itself; its state travels in every
  checkpoint, so a resumed run sees the rows that it would have seen.
* Heads may learn at their own rate, and every head's loss is logged.
* A loss that is not finite stops the run before the update.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints

from vita_audio.training.arguments import StageArguments
from vita_audio.training.checkpoints import (
    load_loader_states,
    mark_complete,
    mark_incomplete,
    save_loader_state,
)
from vita_audio.training.scheduler import build_scheduler
from vita_audio.training.stages import parameter_groups


class ResumableLoader(Protocol):
    """An endless source of batches that can say and restore where it is."""

    def __iter__(self) -> Iterable[dict[str, Any]]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any] | list[dict[str, Any]]) -> None: ...
    def counts(self) -> dict[str, float]: ...


class SpeechTrainer(Trainer):
    """Trains one stage.

    Args:
        build_loader: makes this rank's loader; called once per :meth:`train`.
        Other arguments are the Trainer's.
    """

    args: StageArguments

    def __init__(self, *, build_loader: Callable[[], ResumableLoader], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._build_loader = build_loader
        self._loader: ResumableLoader | None = None
        self._resume_from: str | None = None
        # Deleting old checkpoints is ours: the Trainer would do it before the new one is known to be whole.
        self._checkpoints_to_keep, self.args.save_total_limit = self.args.save_total_limit, None
        self._part_losses: dict[str, torch.Tensor] = {}
        self._micro_batches = 0

    # -- data ---------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any):
        """Train to ``max_steps``, from the start or from a complete checkpoint's folder."""
        self._resume_from = resume_from_checkpoint
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def get_train_dataloader(self) -> ResumableLoader:
        """This rank's loader, put where the checkpoint left it."""
        self._loader = self._build_loader()
        if self._resume_from is not None:
            states = load_loader_states(self._resume_from)
            if len(states) == self.args.world_size:
                self._loader.load_state_dict(states[self.args.process_index])
            else:
                self._loader.load_state_dict(states)
        return self._loader

    # -- optimizer ----------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with the heads' own rate; used when the DeepSpeed config builds none."""
        if self.optimizer is None:
            groups = parameter_groups(
                self.model if model is None else model,
                self.args.learning_rate,
                self.args.weight_decay,
                self.args.mtp_learning_rate_multiplier,
                decay_norms=self.args.decay_norms,
            )
            self.optimizer = torch.optim.AdamW(
                groups,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                eps=self.args.adam_epsilon,
                fused=self.args.device.type == "cuda",
            )
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> LRScheduler:
        """The schedule of ``--lr_scheduler_type``; DeepSpeed calls this too when it builds the optimizer."""
        if self.lr_scheduler is None:
            self.lr_scheduler = build_scheduler(
                self.args.lr_scheduler_type,
                self.optimizer if optimizer is None else optimizer,
                self.args.get_warmup_steps(num_training_steps),
                num_training_steps,
                self.args.lr_scheduler_kwargs,
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    # -- loss ---------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The model's loss, with its parts kept for the log.

        Raises:
            FloatingPointError: the loss is not finite.
        """
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
            self._keep_parts(outputs)
        return (loss, outputs) if return_outputs else loss

    def _keep_parts(self, outputs: Any) -> None:
        self._micro_batches += 1
        parts = {}
        if getattr(outputs, "main_loss", None) is not None:
            parts["main_loss"] = outputs.main_loss
        if getattr(outputs, "mtp_losses", None) is not None:
            parts.update({f"mtp_loss_{k}": value for k, value in enumerate(outputs.mtp_losses)})
        for name, value in parts.items():
            self._part_losses[name] = self._part_losses.get(name, 0.0) + value.detach().float()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the losses of main model and heads, and the data's counters, to a training log line."""
        if "loss" in logs:
            steps = max(1, self._micro_batches // self.args.gradient_accumulation_steps)
            # Under --loss_average global each rank's part is a share of the global mean: its sum was divided by the
            # items of all ranks. Under rank it is that rank's own mean.
            reduction = "sum" if self.args.loss_average == "global" else "mean"
            for name, total in sorted(self._part_losses.items()):
                logs[name] = self.accelerator.reduce(total, reduction=reduction).item() / steps
            self._part_losses.clear()
            self._micro_batches = 0
            if self._loader is not None:
                logs.update({f"data/{name}": value for name, value in self._loader.counts().items()})
        super().log(logs, start_time)

    # -- checkpoints --------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = f"{self._get_output_dir(trial)}/checkpoint-{self.state.global_step}"
        if self.args.should_save:
            mark_incomplete(folder)
        self.accelerator.wait_for_everyone()
        save_loader_state(folder, self.args.process_index, self._loader.state_dict())
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            mark_complete(folder)
            rotate_checkpoints(
                output_dir=self._get_output_dir(trial), save_total_limit=self._checkpoints_to_keep
            )
