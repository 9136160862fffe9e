"""Continuing a run with changed options: which apply, which have no effect, and which are refused.

A checkpoint keeps the options it was trained with (``run.json``). Each difference is logged in one line
before the first step; no change by the user is dropped silently.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from vita_audio.files import read_json
from vita_audio.provenance import RUN_FILE
from vita_audio.training.arguments import StageArguments
from vita_audio.training.checkpoints import writers

_OF_THE_PLACE = frozenset({"output_dir", "local_rank", "run_name", "overwrite_output_dir"})
"""Options that describe where a run happens and do not affect its results."""
_WITHOUT_EFFECT = {
    "model_name_or_path": "the weights come from the checkpoint",
    "audio_model_name_or_path": "the encoder's weights come from the checkpoint",
    "seed": "random states come from the checkpoint, the order of the data from --data_seed",
}
_FIXED = frozenset(
    {
        "num_nextn_predict_layers",
        "language_model_freeze",
        "audio_model_freeze",
        "audio_tokenizer_type",
        "dtype",
        "bf16",
        "fp16",
        "optim",
        "decay_norms",
        "lora_r",
        "lora_alpha",
        "lora_target_modules",
        "lora_train_embeddings",
        "deepspeed.zero_optimization.stage",
        "deepspeed_builds_optimizer",
    }
)
"""Options that determine the shape, type or grouping of the checkpoint's tensors."""


class ContinuationError(ValueError):
    """Options that do not fit the checkpoint. The message names option and checkpoint."""


def describe_changes(checkpoint: str | Path, arguments: Mapping[str, Any]) -> list[str]:
    """One line for each option that differs from those of the checkpoint.

    Args:
        checkpoint: its folder.
        arguments: this run's arguments, as in ``run.json``.

    Raises:
        ContinuationError: an option that the checkpoint fixes has changed.
    """
    file = Path(checkpoint) / RUN_FILE
    try:
        before = {"lora_r": 0, **_flat(read_json(file)["arguments"])}  # earlier versions had no LoRA
    except FileNotFoundError:
        return [
            f"{checkpoint} has no {RUN_FILE}: options that have changed since it was written are not listed"
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ContinuationError(
            f"{file}: cannot be read ({error}); delete it to continue without comparing"
        ) from error
    now = _flat(arguments)
    without_effect = dict(_WITHOUT_EFFECT)
    if now.get("lora_r"):
        without_effect["model_name_or_path"] = "it must hold the weights that the adapters were trained on"
    lines = []
    for name in sorted(before.keys() & now.keys() - _OF_THE_PLACE):
        old, new = before[name], now[name]
        if old == new:
            continue
        change = f"--{name} {_shown(new)} (was {_shown(old)})"
        if name in _FIXED:
            raise ContinuationError(
                f"{change}: {checkpoint} cannot be continued with it; restore it, or start the stage in an empty folder"
            )
        effect = (
            f"has no effect: {without_effect[name]}" if name in without_effect else "applies from here on"
        )
        lines.append(f"{change} {effect}")
    return lines


def _flat(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Nested options, such as those of a DeepSpeed config, under dotted names."""
    flat: dict[str, Any] = {}
    for name, value in arguments.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{inner}": item for inner, item in _flat(value).items()}
        else:
            flat[name] = value
    return flat


def _shown(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def fit_to_processes(checkpoint: str | Path, stage_args: StageArguments) -> None:
    """Let DeepSpeed read the converted form of a checkpoint from another number of processes.

    Raises:
        ContinuationError: it was not converted; the message names the command.
    """
    before = writers(checkpoint)
    if not stage_args.deepspeed or before == stage_args.world_size:
        return
    if not (Path(checkpoint) / "latest_universal").is_file():
        raise ContinuationError(
            f"{checkpoint} was written by {before} processes and this run has {stage_args.world_size}; start {before}, "
            f"or convert it first: bash scripts/deepspeed/convert_checkpoint.sh {checkpoint}"
        )
    stage_args.hf_deepspeed_config.config["checkpoint"] = {"load_universal": True}


class PlannedRates:
    """The optimizer's options and the schedule from this run's arguments.

    A checkpoint restores those of the run that wrote it, and a lower ``--learning_rate`` would have no
    effect. So they are recorded when optimizer and schedule are created and restored after the checkpoint is loaded;
    the moments and the number of steps remain the checkpoint's.

    Args:
        scheduler: not stepped yet.
    """

    def __init__(self, scheduler: LRScheduler) -> None:
        self._scheduler = scheduler
        self._options = [
            {name: value for name, value in group.items() if name not in ("params", "lr")}
            for group in scheduler.optimizer.param_groups
        ]
        self._peaks = list(scheduler.base_lrs)

    def restore(self) -> None:
        """Apply this run's options from the next step on."""
        scheduler = self._scheduler
        groups = scheduler.optimizer.param_groups
        for group, options in zip(groups, self._options, strict=True):
            group.update(options)
        if not isinstance(scheduler, LambdaLR):
            return  # its rate depends on earlier steps, not only on the schedule
        rates = [
            peak * share(scheduler.last_epoch)
            for peak, share in zip(self._peaks, scheduler.lr_lambdas, strict=True)
        ]
        scheduler.load_state_dict({**scheduler.state_dict(), "base_lrs": self._peaks, "_last_lr": rates})
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
