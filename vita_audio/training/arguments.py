"""Every option of a training run on one screen, each with its check beside it.

Three groups, parsed together from the command line: what the model is, what it reads,
and how it is trained. Whatever transformers' own ``TrainingArguments`` has (learning rate,
steps, DeepSpeed config, …) keeps its name and meaning.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import TrainingArguments, get_scheduler

from vita_audio.audio import available_kinds, is_continuous_kind
from vita_audio.chat.interleave import check_ratio
from vita_audio.constants import DEFAULT_TEXT_AUDIO_RATIO
from vita_audio.training.machine import check_devices


class ArgumentError(ValueError):
    """An option that cannot be served; the message says which and what to do."""


@dataclass
class ModelArguments:
    """The language model and its audio input."""

    model_name_or_path: str = field(
        metadata={"help": "Folder of a plain Qwen2 model or of an earlier stage's result."}
    )
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "Folder of the text tokenizer; the model's folder when absent."}
    )
    num_nextn_predict_layers: int = field(
        default=0, metadata={"help": "MCTP heads (0, 1 or 10 in the paper); missing ones are grown."}
    )
    attn_implementation: str = field(
        default="auto",
        metadata={
            "help": "flash_attention_2, sdpa, flex_attention or eager; auto takes FlashAttention-2 "
            "if it is there and the model is in half precision."
        },
    )
    dtype: str = field(
        default="auto", metadata={"help": "Weights' type: bfloat16, float16 or float32; auto follows --bf16."}
    )
    mtp_loss_weight: float | None = field(
        default=None, metadata={"help": "Weight of the heads' mean loss; the checkpoint's own when absent."}
    )
    language_model_freeze: bool = field(
        default=False, metadata={"help": "Train the MCTP heads alone (stages 2 and 3)."}
    )
    audio_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "SenseVoiceSmall's folder (am.mvn and weights), for sensevoice kinds."},
    )
    audio_model_freeze: bool = field(
        default=True, metadata={"help": "Keep the SenseVoice encoder as it is (all published stages)."}
    )

    def __post_init__(self) -> None:
        if self.num_nextn_predict_layers < 0:
            raise ArgumentError(
                f"--num_nextn_predict_layers {self.num_nextn_predict_layers}: give the number of heads, 0 or more"
            )
        if self.language_model_freeze and self.num_nextn_predict_layers == 0:
            raise ArgumentError(
                "--language_model_freeze with no heads leaves nothing to train: "
                "set --num_nextn_predict_layers to 1 or more"
            )
        if self.dtype not in ("auto", "bfloat16", "float16", "float32"):
            raise ArgumentError(f"--dtype {self.dtype}: give auto, bfloat16, float16 or float32")
        if not Path(self.model_name_or_path).is_dir():
            raise ArgumentError(
                f"--model_name_or_path {self.model_name_or_path}: no such folder; "
                "give the base model's folder, or run the previous stage first"
            )


@dataclass
class DataArguments:
    """The data mix, the codec that reads it, and the shape of a row."""

    dataset_name: str = field(metadata={"help": "YAML file of the data mix."})
    audio_tokenizer_type: str = field(
        metadata={"help": f"Codec: {', '.join(available_kinds())}."},
    )
    audio_tokenizer_path: str | None = field(
        default=None, metadata={"help": "Folder of the discrete codec's weights."}
    )
    audio_token_cache: str | None = field(
        default=None, metadata={"help": "Folder of token shards that tools/tokenize_audio.py wrote."}
    )
    audio_feature_cache: str | None = field(
        default=None,
        metadata={"help": "Folder to keep SenseVoice features in, for later epochs and stages."},
    )
    data_root: str | None = field(
        default=None, metadata={"help": "Relative paths in the mix start here; its own folder when absent."}
    )
    model_max_length: int = field(default=8192, metadata={"help": "Tokens in a packed row."})
    text_audio_interval_ratio: list[int] = field(
        default_factory=lambda: list(DEFAULT_TEXT_AUDIO_RATIO),
        metadata={"help": "Text and audio run lengths, in turn: 1 10 4 10 (Boost), 1 4 3 8 4 10 (Balance)."},
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
                f"--audio_tokenizer_type {self.audio_tokenizer_type}: known are {', '.join(available_kinds())}"
            )
        if not Path(self.dataset_name).is_file():
            raise ArgumentError(f"--dataset_name {self.dataset_name}: no such file; give the mix's YAML")
        if self.model_max_length < 16:
            raise ArgumentError(f"--model_max_length {self.model_max_length}: too short for any document")
        if not 0 <= self.max_error_share <= 1:
            raise ArgumentError(f"--max_error_share {self.max_error_share}: give a share between 0 and 1")
        try:
            check_ratio(self.text_audio_interval_ratio)
        except ValueError as error:
            raise ArgumentError(f"--text_audio_interval_ratio: {error}") from error
        if len(self.text_audio_interval_ratio) % 2:
            raise ArgumentError(
                f"--text_audio_interval_ratio {self.text_audio_interval_ratio}: give pairs 'text audio', since the "
                "model's schedule is made of them too"
            )

    @property
    def continuous_input(self) -> bool:
        return is_continuous_kind(self.audio_tokenizer_type)


@dataclass
class StageArguments(TrainingArguments):
    """transformers' own options, with the defaults of this recipe and the heads' learning rate."""

    mtp_learning_rate_multiplier: float = field(
        default=1.0, metadata={"help": "The heads' learning rate over the model's (10 in stage 4)."}
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Delete what an earlier run left in the output folder and start over."},
    )
    # A row is a tensor already and the loader shards itself, so nothing may be dropped or re-split.
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
        if self.mtp_learning_rate_multiplier <= 0:
            raise ArgumentError(
                f"--mtp_learning_rate_multiplier {self.mtp_learning_rate_multiplier}: must be above 0"
            )
        builds_optimizer = bool(self.deepspeed) and "optimizer" in _read_deepspeed_config(self.deepspeed)
        if builds_optimizer and self.mtp_learning_rate_multiplier != 1:
            raise ArgumentError(
                f"--mtp_learning_rate_multiplier needs per-group rates, but {self.deepspeed} builds the optimizer "
                "itself: use a DeepSpeed config without an optimizer section (ds_config_zero2_no_optimizer.json)"
            )
        self._check_scheduler()
        check_devices(self.ddp_backend, self.use_cpu)
        super().__post_init__()

    def _check_scheduler(self) -> None:
        """Build the schedule once for nothing: a wrong argument would otherwise show when the model is loaded."""
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        try:
            if isinstance(self.lr_scheduler_kwargs, str):
                self.lr_scheduler_kwargs = json.loads(self.lr_scheduler_kwargs)
            arguments = self.lr_scheduler_kwargs or {}
            get_scheduler(self.lr_scheduler_type, optimizer, 1, 2, scheduler_specific_kwargs=arguments)
        except (TypeError, ValueError) as error:
            raise ArgumentError(
                f"--lr_scheduler_kwargs {self.lr_scheduler_kwargs}: give JSON that fits --lr_scheduler_type "
                f'{self.lr_scheduler_type}, such as {{"min_lr_rate": 0.1}}: {error}'
            ) from error


def _read_deepspeed_config(deepspeed: str | dict) -> dict:
    if isinstance(deepspeed, dict):
        return deepspeed
    try:
        if deepspeed.startswith("{"):  # the JSON itself, which transformers takes too
            return json.loads(deepspeed)
        return json.loads(Path(deepspeed).read_text(encoding="utf-8"))
    except OSError as error:
        raise ArgumentError(
            f"--deepspeed {deepspeed}: cannot be read; give a file of scripts/deepspeed"
        ) from error
    except ValueError as error:
        raise ArgumentError(f"--deepspeed {deepspeed}: not valid JSON ({error}); correct the file") from error
