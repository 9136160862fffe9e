"""Every option of a training run, each with its check.

Three groups, parsed together by :mod:`vita_audio.training.command_line`: what the model is, what it reads,
and how it is trained. Options of transformers' own ``TrainingArguments`` (learning rate, steps, DeepSpeed
config, …) keep their names and meanings; :mod:`vita_audio.training.served` lists those that are refused. The
published scripts' names for the same options are aliases.
"""

from __future__ import annotations

import json
import logging
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import SchedulerType
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import strtobool

from vita_audio.audio import available_kinds, is_continuous_kind
from vita_audio.chat.interleave import check_ratio
from vita_audio.constants import DEFAULT_TEXT_AUDIO_RATIO
from vita_audio.distributed import is_first
from vita_audio.training.deepspeed_config import (
    DeepSpeedConfigError,
    builds_optimizer,
    check_deepspeed_config,
    check_values,
    published_schedule,
    read_deepspeed_config,
    use_pytorch_adam,
)
from vita_audio.training.lora_arguments import LoraArguments
from vita_audio.training.machine import check_devices
from vita_audio.training.optimizers import check_optimizer
from vita_audio.training.published import check_architecture, heads_in_config
from vita_audio.training.scheduler import SCHEDULER_NAMES, WARMUP_COSINE, build_scheduler
from vita_audio.training.served import find_out_of_range, find_unserved
from vita_audio.training.step_arguments import StepArguments
from vita_audio.training.validation_arguments import ValidationArguments

logger = logging.getLogger(__name__)


_LONGEST_ROW = 2**24
"""Tokens. A longer row would be filled for hours before it turned out not to fit any memory."""


class ArgumentError(ValueError):
    """An invalid or unsupported option; the message names it and what to do."""


@dataclass
class ModelArguments(LoraArguments):
    """The language model and its audio input."""

    model_name_or_path: str = field(
        metadata={"help": "Folder of a plain Qwen2 model or of an earlier stage's result."}
    )
    config_name: str | None = field(
        default=None,
        metadata={
            "help": "Folder or JSON file of a config: its number of heads is used and the rest must fit the model "
            "(configs/models/)."
        },
    )
    tokenizer_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Folder of the text tokenizer (default: the model's folder).",
            "aliases": ["--tokenizer_name"],
        },
    )
    num_nextn_predict_layers: int = field(
        default=-1,
        metadata={
            "help": "MCTP heads (0, 1 or 10 in the paper); missing ones are grown. -1: those of --config_name, else of "
            "the model."
        },
    )
    attn_implementation: str = field(
        default="auto",
        metadata={
            "help": "flash_attention_2, sdpa, flex_attention or eager; auto uses FlashAttention-2 "
            "if it is installed and the model is in half precision."
        },
    )
    dtype: str = field(
        default="auto",
        metadata={
            "help": "Type of the weights: bfloat16, float16 or float32; auto follows --bf16.",
            "aliases": ["--torch_dtype"],
        },
    )
    mtp_loss_weight: float | None = field(
        default=None, metadata={"help": "Weight of the heads' mean loss (default: the checkpoint's)."}
    )
    language_model_freeze: bool = field(
        default=False, metadata={"help": "Train only the MCTP heads (stages 2 and 3)."}
    )
    audio_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "SenseVoiceSmall's folder (am.mvn and weights), for sensevoice kinds."},
    )
    audio_model_freeze: bool = field(
        default=True, metadata={"help": "Freeze the SenseVoice encoder (all published stages)."}
    )

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", "bfloat16", "float16", "float32"):
            raise ArgumentError(f"--dtype {self.dtype}: give auto, bfloat16, float16 or float32")
        if not Path(self.model_name_or_path).is_dir():
            raise ArgumentError(
                f"--model_name_or_path {self.model_name_or_path}: no such folder; "
                "give the base model's folder, or run the previous stage first"
            )
        if self.mtp_loss_weight is not None and not 0 <= self.mtp_loss_weight < math.inf:
            raise ArgumentError(f"--mtp_loss_weight {self.mtp_loss_weight}: give a number 0 or more")
        try:
            self.check_lora(language_model_freeze=self.language_model_freeze)
        except ValueError as error:
            raise ArgumentError(str(error)) from error
        self._count_heads()
        if self.language_model_freeze and self.num_nextn_predict_layers == 0:
            raise ArgumentError(
                "--language_model_freeze with no heads leaves nothing to train: "
                "set --num_nextn_predict_layers to 1 or more"
            )

    def _count_heads(self) -> None:
        """Resolve ``num_nextn_predict_layers`` from the flag, ``--config_name`` and the model's folder."""
        heads = self.num_nextn_predict_layers
        if heads < -1:
            raise ArgumentError(f"--num_nextn_predict_layers {heads}: give the number of heads, 0 or more")
        if self.config_name is not None:
            try:
                configured = heads_in_config(self.config_name)
                check_architecture(self.config_name, self.model_name_or_path)
            except ValueError as error:
                raise ArgumentError(str(error)) from error
            if heads not in (-1, configured):
                raise ArgumentError(
                    f"--num_nextn_predict_layers {heads}: --config_name {self.config_name} has {configured}; "
                    "give one of the two"
                )
            heads = configured
        elif heads == -1:
            config = Path(self.model_name_or_path) / "config.json"
            heads = heads_in_config(str(config)) if config.is_file() else 0
        self.num_nextn_predict_layers = heads


@dataclass
class DataArguments(ValidationArguments):
    """The data mix, the codec that reads it, and the shape of a row."""

    dataset_name: str = field(metadata={"help": "YAML file of the data mix."})
    audio_tokenizer_type: str = field(
        metadata={"help": f"Codec: {', '.join(available_kinds())}."},
    )
    audio_tokenizer_path: str | None = field(
        default=None, metadata={"help": "Folder of the discrete codec's weights."}
    )
    audio_token_cache: str | None = field(
        default=None, metadata={"help": "Folder of token shards written by tools/tokenize_audio.py."}
    )
    audio_feature_cache: str | None = field(
        default=None,
        metadata={"help": "Folder in which to cache SenseVoice features for later epochs and stages."},
    )
    data_root: str | None = field(
        default=None,
        metadata={
            "help": "Base folder of relative paths in mix and samples (default: $ROOT_PATH, else the mix's folder)."
        },
    )
    model_max_length: int = field(default=8192, metadata={"help": "Tokens in a packed row."})
    text_audio_interval_ratio: list[int] = field(
        default_factory=lambda: list(DEFAULT_TEXT_AUDIO_RATIO),
        metadata={
            "help": "Alternating text and audio run lengths: 1 10 4 10 (Boost), 1 4 3 8 4 10 (Balance)."
        },
    )
    max_error_share: float = field(
        default=0.05, metadata={"help": "Stop when more than this share of samples is unusable."}
    )
    strict_data: bool = field(
        default=False, metadata={"help": "Refuse to start when a file of the mix is missing."}
    )

    def __post_init__(self) -> None:
        if self.audio_tokenizer_type not in available_kinds():
            raise ArgumentError(
                f"--audio_tokenizer_type {self.audio_tokenizer_type}: use {', '.join(available_kinds())}"
            )
        if not Path(self.dataset_name).is_file():
            raise ArgumentError(f"--dataset_name {self.dataset_name}: no such file; give the mix's YAML")
        if self.model_max_length < 16:
            raise ArgumentError(f"--model_max_length {self.model_max_length}: too short for any document")
        if self.model_max_length > _LONGEST_ROW:
            raise ArgumentError(f"--model_max_length {self.model_max_length}: give at most {_LONGEST_ROW}")
        if not 0 <= self.max_error_share <= 1:
            raise ArgumentError(f"--max_error_share {self.max_error_share}: give a share between 0 and 1")
        problem = self.check_validation()
        if problem is not None:
            raise ArgumentError(problem)
        try:
            check_ratio(self.text_audio_interval_ratio)
        except ValueError as error:
            raise ArgumentError(f"--text_audio_interval_ratio: {error}") from error
        if len(self.text_audio_interval_ratio) % 2:
            raise ArgumentError(
                f"--text_audio_interval_ratio {self.text_audio_interval_ratio}: give pairs 'text audio'; the "
                "model's schedule uses the same pairs"
            )

    @property
    def continuous_input(self) -> bool:
        return is_continuous_kind(self.audio_tokenizer_type)


@dataclass
class StageArguments(StepArguments):
    """transformers' own options, with this recipe's defaults, and the options of the stages."""

    if TYPE_CHECKING:  # never None: transformers' own __post_init__ ensures it
        output_dir: str = ""

    do_train: bool = field(default=True, metadata={"help": "Always true: this tool only trains."})
    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Delete an earlier run's results from the output folder and start over."},
    )
    lr_scheduler_type: str = field(
        default=WARMUP_COSINE,
        metadata={
            "help": f"{WARMUP_COSINE}: the published schedule, a log warm-up and cosine to a tenth; or one of "
            "transformers' names. cosine without --lr_scheduler_kwargs uses the scheduler section of --deepspeed."
        },
    )
    warmup_steps: float = field(
        default=0,
        metadata={
            "help": "Warm-up steps or, below 1, their share of --max_steps (0.03 in all stages).",
            "aliases": ["--warmup_ratio"],
        },
    )
    mtp_learning_rate_multiplier: float = field(
        default=1.0,
        metadata={
            "help": "Ratio of the heads' learning rate to the model's (10 in stage 4).",
            "aliases": ["--mtp_model_lr_mult"],
        },
    )
    decay_norms: bool = field(
        default=False,
        metadata={"help": "Also apply weight decay to the RMSNorm weights, as in the published stage 4."},
    )
    loss_average: str = field(
        default="global",
        metadata={
            "help": "Divisor of the loss: supervised tokens of all ranks (global), or of each rank separately, with "
            "gradients averaged over ranks (rank, as published)."
        },
    )
    save_at: float | None = field(
        default=None,
        metadata={"help": "Also save a checkpoint whenever so many minutes have passed since the last one."},
    )
    hang_minutes: float = field(
        default=60,
        metadata={"help": "End a process, with its stacks, that makes no progress for so long; 0: never."},
    )
    detail_steps: float = field(
        default=0.01,
        metadata={
            "help": "Log losses and accuracies of each task and source every so many steps or, below 1, this share of "
            "--max_steps."
        },
    )
    # Rows are already tensors and the loader shards itself, so nothing may be dropped or split again.
    remove_unused_columns: bool = field(default=False)
    ignore_data_skip: bool = field(
        default=True, metadata={"help": "The loader resumes from its own state; nothing is replayed."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "A non-finite loss stops the run; it is never averaged away."}
    )

    def __post_init__(self) -> None:
        if self.max_steps <= 0:
            raise ArgumentError(
                f"--max_steps {self.max_steps}: rows are endless, so give the number of steps"
            )
        if self.loss_average not in ("global", "rank"):
            raise ArgumentError(f"--loss_average {self.loss_average}: give global or rank")
        if self.save_at is not None and not self.save_at > 0:
            raise ArgumentError(f"--save_at {self.save_at}: give minutes, more than 0")
        if not self.detail_steps > 0:
            raise ArgumentError(f"--detail_steps {self.detail_steps}: give steps, or a share below 1")
        if not self.hang_minutes >= 0:
            raise ArgumentError(f"--hang_minutes {self.hang_minutes}: give minutes, or 0 for no limit")
        if self.loss_average == "rank":  # also if the arguments were already processed once
            self.average_tokens_across_devices = True
        problem = find_out_of_range(self) or find_unserved(self) or self.check_step()
        if problem is not None:
            raise ArgumentError(problem)
        self._read_scheduler()
        try:
            self._prepare_deepspeed_and_device()
        except DeepSpeedConfigError as error:
            raise ArgumentError(str(error)) from error
        try:
            builds = isinstance(self.deepspeed, dict) and builds_optimizer(self.deepspeed)
            optim = getattr(self.optim, "value", self.optim)
            check_optimizer(optim, use_cpu=self.use_cpu, deepspeed_builds=builds)
        except ValueError as error:
            raise ArgumentError(str(error)) from error
        self._check_scheduler()
        self._use_current_names()
        check_devices(self.ddp_backend, self.use_cpu)
        self.average_tokens_across_devices = self.loss_average == "global"
        # transformers accepts only the names of its own schedules.
        name, self.lr_scheduler_type = self.lr_scheduler_type, SchedulerType.COSINE
        if name != WARMUP_COSINE:
            self.lr_scheduler_type = name
        with self.without_compilation():
            super().__post_init__()
        self.lr_scheduler_type = name
        self._check_reports()
        self._check_agreement_with_deepspeed()

    def _prepare_deepspeed_and_device(self) -> None:
        """Check the DeepSpeed config, adopt its schedule, and replace what CPUs lack if training on CPUs."""
        replaced = []
        self.use_cpu = self.use_cpu or strtobool(os.environ.get("ACCELERATE_USE_CPU", "false")) == 1
        if self.deepspeed:
            name = self._deepspeed_name = self.deepspeed if isinstance(self.deepspeed, str) else "(a dict)"
            config = read_deepspeed_config(self.deepspeed)
            self._check_groups(config, name)
            half_precision = "bf16" if self.bf16 else "fp16" if self.fp16 else None
            check_deepspeed_config(config, name, half_precision=half_precision)
            if "scheduler" in config:
                if self.lr_scheduler_type == "cosine" and not self.lr_scheduler_kwargs:
                    self.lr_scheduler_kwargs = published_schedule(
                        config,
                        name,
                        warmup_steps=max(1, self.get_warmup_steps(self.max_steps)),
                        max_steps=self.max_steps,
                    )
                    self.lr_scheduler_type = WARMUP_COSINE
                # The schedule is always ours, even if DeepSpeed builds the optimizer.
                del config["scheduler"]
            if (self.use_cpu or not torch.cuda.is_available()) and use_pytorch_adam(config):
                replaced.append("PyTorch's Adam instead of DeepSpeed's")
            self.deepspeed = config
        if self.use_cpu:
            if self.ddp_backend == "nccl":
                replaced.append("gloo instead of nccl")
            # A single process has no peers, and accelerate would look for a process group.
            self.ddp_backend = "gloo" if "RANK" in os.environ else None
            if self.tf32:
                replaced.append("no tf32")
                self.tf32 = None
        if replaced:
            say_once(f"training on CPUs: {', '.join(replaced)}")

    def _check_groups(self, config: dict[str, Any], name: str) -> None:
        if not builds_optimizer(config):
            return
        if self.mtp_learning_rate_multiplier != 1:
            raise ArgumentError(
                f"--mtp_learning_rate_multiplier needs per-group rates, but {name} builds the optimizer "
                "itself: use a DeepSpeed config without an optimizer section (ds_config_zero2_no_optimizer.json)"
            )
        if self.weight_decay and not self.decay_norms:
            raise ArgumentError(
                f"--weight_decay {self.weight_decay}: {name} builds the optimizer itself and decays every parameter; "
                "use ds_config_zero2_no_optimizer.json to exclude the norms, or give --decay_norms True"
            )

    def _read_scheduler(self) -> None:
        self.lr_scheduler_type = getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type)
        if self.lr_scheduler_type not in SCHEDULER_NAMES:
            raise ArgumentError(
                f"--lr_scheduler_type {self.lr_scheduler_type}: give one of {', '.join(SCHEDULER_NAMES)}"
            )
        if self.lr_scheduler_type in _NEED_EVALUATION:
            raise ArgumentError(
                f"--lr_scheduler_type {self.lr_scheduler_type}: it needs evaluation during training"
            )
        if isinstance(self.lr_scheduler_kwargs, str):
            try:
                self.lr_scheduler_kwargs = json.loads(self.lr_scheduler_kwargs)
            except ValueError as error:
                raise self._unfit_scheduler_arguments(error) from error
        if not isinstance(self.lr_scheduler_kwargs, dict | None):
            raise self._unfit_scheduler_arguments(TypeError("not a JSON object"))

    @property
    def scheduler_arguments(self) -> dict[str, Any]:
        """``--lr_scheduler_kwargs``, read and checked."""
        return self.lr_scheduler_kwargs if isinstance(self.lr_scheduler_kwargs, dict) else {}

    def _use_current_names(self) -> None:
        """Pass ``--gradient_checkpointing`` on under the name that newer transformers expects.

        The stage scripts keep the published name. transformers 5.23 accepts it with a warning; 5.17 knows only it.
        """
        for published, current in (
            ("gradient_checkpointing", "activation_checkpointing"),
            ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
        ):
            if hasattr(self, current) and getattr(self, current) is None:
                setattr(self, current, getattr(self, published))

    def _check_scheduler(self) -> None:
        """Build the schedule for a dummy optimizer, so wrong arguments fail before the model is loaded."""
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        try:
            build_scheduler(self.lr_scheduler_type, optimizer, 1, 2, self.scheduler_arguments)
        except (TypeError, ValueError) as error:
            raise self._unfit_scheduler_arguments(error) from error

    def _unfit_scheduler_arguments(self, error: Exception) -> ArgumentError:
        example = "cos_min_ratio" if self.lr_scheduler_type == WARMUP_COSINE else "min_lr_rate"
        return ArgumentError(
            f"--lr_scheduler_kwargs {self.lr_scheduler_kwargs}: give JSON that fits --lr_scheduler_type "
            f'{self.lr_scheduler_type}, such as {{"{example}": 0.1}}: {error}'
        )

    def _check_reports(self) -> None:
        """transformers looks for the packages after the model is loaded."""
        available = get_available_reporting_integrations()
        for name in self.report_to or ():
            if name not in available:
                raise ArgumentError(
                    f"--report_to {name}: no such tracker is installed; give one of "
                    f"{', '.join([*available, 'none'])}, or install the package"
                )

    def _check_agreement_with_deepspeed(self) -> None:
        """Compare the config with the flags. transformers does so only after the model is loaded, in eight lines."""
        if self.deepspeed and self.hf_deepspeed_config.mismatches:
            mismatch = (
                self.hf_deepspeed_config.mismatches[0].removeprefix("- ds ").replace(" vs hf ", ", but --")
            )
            raise ArgumentError(f'--deepspeed has {mismatch}; set the config\'s value to "auto"')
        if self.deepspeed and self.torch_compile and self.hf_deepspeed_config.is_zero3():
            raise ArgumentError(
                "--torch_compile True: ZeRO-3 gathers weights between all operations, so nothing would be compiled; "
                "leave it out, or give a DeepSpeed config with ZeRO-2"
            )
        if self.deepspeed:
            try:
                check_values(self.hf_deepspeed_config.config, self._deepspeed_name)
            except DeepSpeedConfigError as error:
                raise ArgumentError(str(error)) from error

    def validate_every(self, default: float) -> None:
        """Turn validation on, every ``--eval_steps`` or, without it, the default share of the steps."""
        self.eval_strategy = IntervalStrategy.STEPS
        self.eval_steps = default if self.eval_steps is None else self.eval_steps


_NEED_EVALUATION = ("reduce_lr_on_plateau", "greedy")


def say_once(message: str) -> None:
    """Log a line on the first process; all processes read the same flags."""
    if is_first():
        logger.warning(message)
