"""Which of transformers' TrainingArguments this trainer supports, and why it refuses the others.

A flag that is accepted and then ignored is worse than one that is refused. So :data:`OPTIONS` lists every field of
``TrainingArguments``, and a test fails when an upgrade adds a field that is not listed.
"""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, fields
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from vita_audio.training.optimizers import EIGHT_BIT


@dataclass(frozen=True)
class Option:
    """How one field is treated.

    Attributes:
        allowed: the supported values. None: every value.
        reason: why other values are refused, and what to do instead.
    """

    allowed: tuple[Any, ...] | None = None
    reason: str = ""


@dataclass(frozen=True)
class Range:
    """The numbers that an option may have.

    Attributes:
        low: the lowest.
        high: what it must stay below.
        without_low: whether ``low`` itself is excluded.
    """

    low: float
    high: float = math.inf
    without_low: bool = False

    def holds(self, value: float) -> bool:
        """Whether it contains a number; it never contains NaN."""
        return self.low <= value < self.high and not (self.without_low and value == self.low)

    def __str__(self) -> str:
        low = f"above {self.low:g}" if self.without_low else f"{self.low:g} or more"
        return low if self.high == math.inf else f"{low} and below {self.high:.10g}"


RANGES = {
    **dict.fromkeys(("learning_rate", "weight_decay", "warmup_steps", "max_grad_norm"), Range(0)),
    **dict.fromkeys(("dataloader_num_workers", "save_total_limit"), Range(0)),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), Range(0, 1)),
    **dict.fromkeys(("gradient_accumulation_steps", "per_device_train_batch_size"), Range(1)),
    **dict.fromkeys(
        ("adam_epsilon", "ddp_timeout", "mtp_learning_rate_multiplier"), Range(0, without_low=True)
    ),
    **dict.fromkeys(("save_steps", "logging_steps", "eval_steps"), Range(0, without_low=True)),
    "seed": Range(0, 2**32),  # NumPy's
}
"""Ranges that transformers and PyTorch do not check, or check only after the model is loaded."""
_INTERVALS = {"save_steps": "save_strategy", "logging_steps": "logging_strategy"}


def find_out_of_range(arguments: TrainingArguments) -> str | None:
    """An error message about the first number out of range; None if there is none."""
    for name, range_ in RANGES.items():
        value = getattr(arguments, name)
        if value is None or (name in _INTERVALS and _plain(getattr(arguments, _INTERVALS[name])) == "no"):
            continue
        if not range_.holds(value):
            otherwise = f", or --{_INTERVALS[name]} no" if name in _INTERVALS else ""
            return f"--{name} {value}: give a number {range_}{otherwise}"
    return None


def find_unserved(arguments: TrainingArguments) -> str | None:
    """An error message about the first unsupported option; None if there is none."""
    for field in fields(TrainingArguments):
        value = _plain(getattr(arguments, field.name))
        option = OPTIONS.get(field.name, _UNKNOWN)
        if option.allowed is None or value in option.allowed:
            continue
        return f"--{field.name} {value}: {option.reason}"
    return None


def _plain(value: Any) -> Any:
    """The value of an enum's member; anything else unchanged."""
    return getattr(value, "value", value)


def _defaults() -> dict[str, Any]:
    defaults: dict[str, Any] = {}
    for field in fields(TrainingArguments):
        if field.default is not MISSING:
            defaults[field.name] = _plain(field.default)
        elif field.default_factory is not MISSING:
            defaults[field.name] = field.default_factory()
    return defaults


_DEFAULTS = _defaults()


def _only_default(reason: str, *names: str) -> dict[str, Option]:
    return {name: Option((_DEFAULTS[name],), reason) for name in names if name in _DEFAULTS}


_UNKNOWN = Option((), "an option of this transformers version that the trainer does not know; leave it out")

_SERVED = """
    output_dir max_steps per_device_train_batch_size gradient_accumulation_steps
    learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps weight_decay max_grad_norm
    adam_beta1 adam_beta2 adam_epsilon
    bf16 fp16 tf32 use_cpu deepspeed ddp_backend ddp_timeout
    activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs
    torch_empty_cache_steps torch_compile
    logging_steps logging_first_step log_level log_level_replica log_on_each_node disable_tqdm report_to
    run_name project trackio_space_id trackio_bucket_id trackio_static_space_id skip_memory_metrics debug
    save_steps save_total_limit eval_steps
    seed data_seed full_determinism dataloader_num_workers
    ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph
""".split()

_WITHOUT_EFFECT = """
    num_train_epochs per_device_eval_batch_size local_rank dataloader_pin_memory
""".split()
"""Every value is accepted, because the published scripts or launchers pass them and they have no effect: rows are
endless, so steps decide; validation uses the train batch size; torchrun sets the rank; rows are small."""

_NO_EVALUATION = (
    "give --eval_dataset_name and --eval_steps to validate while training; score the result with "
    "scripts/deepspeed/evaluate_sts.sh"
)
_OWN_LOADER = "the data engine makes, shards and orders the rows itself; leave this option out"
_NO_UPLOAD = "nothing is uploaded during training; push the finished folder with `hf upload`"

OPTIONS: dict[str, Option] = {
    **dict.fromkeys((*_SERVED, *_WITHOUT_EFFECT), Option()),
    "do_train": Option((True,), "this tool only trains; leave this option out"),
    "optim": Option(
        ("adamw_torch", "adamw_torch_fused", *EIGHT_BIT),
        f"every stage uses AdamW (or {EIGHT_BIT[0]}); configure another optimizer in the DeepSpeed config's "
        "optimizer section",
    ),
    "save_strategy": Option(("steps", "no"), "there are no epochs and no evaluation: give steps or no"),
    "logging_strategy": Option(("steps", "no"), "rows are endless, so there are no epochs: give steps or no"),
    "remove_unused_columns": Option((False,), _OWN_LOADER),
    "ignore_data_skip": Option((True,), "the loader resumes from its own state; leave this option out"),
    "logging_nan_inf_filter": Option((False,), "a non-finite loss stops the run and is never averaged away"),
    **_only_default(
        _NO_EVALUATION,
        *"""do_eval do_predict eval_strategy eval_delay eval_on_start eval_do_concat_batches
        eval_use_gather_object eval_accumulation_steps prediction_loss_only include_for_metrics batch_eval_metrics
        bf16_full_eval fp16_full_eval load_best_model_at_end metric_for_best_model greater_is_better""".split(),
    ),
    **_only_default(
        _OWN_LOADER,
        *"""dataloader_drop_last dataloader_persistent_workers dataloader_prefetch_factor
        dataloader_multiprocessing_context dataloader_in_order train_sampling_strategy length_column_name
        label_names""".split(),
    ),
    "accelerator_config": Option((None, AcceleratorConfig()), _OWN_LOADER),
    **_only_default(
        _NO_UPLOAD,
        *"""push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision""".split(),
    ),
    **_only_default(
        "the model computes its own loss, without smoothing: the labels would be shifted incorrectly",
        "label_smoothing_factor",
    ),
    **_only_default("it belongs to optimizers other than AdamW", "optim_args", "optim_target_modules"),
    **_only_default(
        "give --loss_average rank instead, which also logs the heads' losses correctly",
        "average_tokens_across_devices",
    ),
    **_only_default(
        "a stage automatically continues from the last complete checkpoint of --output_dir; start it in that folder",
        "resume_from_checkpoint",
    ),
    **_only_default(
        "a stage could not continue from such a checkpoint; leave this option out", "save_only_model"
    ),
    **_only_default("all nodes must see one output folder", "save_on_each_node"),
    **_only_default(
        "save often with --save_steps instead: a killed stage continues from its last complete checkpoint",
        "enable_jit_checkpoint",
    ),
    **_only_default(
        "callbacks start with the run; leave this option out", "restore_callback_states_from_checkpoint"
    ),
    **_only_default(
        "rows have a fixed length: find a batch size that fits and set it", "auto_find_batch_size"
    ),
    **_only_default("the paper trains without embedding noise", "neftune_noise_alpha"),
    "torch_compile_backend": Option((None, "inductor", "aot_eager"), "untested; leave this option out"),
    "torch_compile_mode": Option(
        (None, "default", "max-autotune-no-cudagraphs"),
        "CUDA graphs of the many parts of a layer are untested; leave this option out",
    ),
    **_only_default(
        "its kernels replace the forward that holds the heads; leave this option out",
        "use_liger_kernel",
        "liger_kernel_config",
    ),
    **_only_default("training needs no key-value cache; leave this option out", "use_cache"),
    "include_num_input_tokens_seen": Option(
        ("no", False), "tokens are rows times --model_max_length; leave this option out"
    ),
    **_only_default(
        "the stages run on DeepSpeed; give --deepspeed scripts/deepspeed/ds_config_zero3.json",
        "fsdp",
        "fsdp_config",
        "parallelism_config",
    ),
}
"""For each field of TrainingArguments, how it is treated."""
