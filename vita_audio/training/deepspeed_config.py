"""Checks a DeepSpeed config against the flags before anything is loaded.

DeepSpeed follows its file, and transformers fills in each ``"auto"``. A value that the file omits gets
DeepSpeed's own default, and the corresponding flag has no effect; such files are refused here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from vita_audio.files import parse_settings

_ADAM = ("adam", "adamw")
_ADAM_FLAGS = {
    "lr": "--learning_rate",
    "betas": "--adam_beta1 and --adam_beta2",
    "eps": "--adam_epsilon",
    "weight_decay": "--weight_decay",
}

_UNTESTED = "zero_allow_untested_optimizer"
_SECTIONS = {"zero_optimization", "optimizer", "scheduler", "bf16", "fp16"}

_DEEPSPEED_WARMUP_COSINE = {"warmup_min_ratio": 0.0, "cos_min_ratio": 0.0001, "warmup_type": "log"}
"""Arguments of DeepSpeed's WarmupCosineLR and their defaults there."""


class DeepSpeedConfigError(ValueError):
    """An unsupported config; the message names it and what to do."""


def read_deepspeed_config(config: str | dict[str, Any]) -> dict[str, Any]:
    """The config as a new dict, from a file, from JSON text or from a dict.

    Raises:
        DeepSpeedConfigError: it cannot be read.
    """
    if isinstance(config, dict):
        return json.loads(json.dumps(config))
    try:
        text = config if config.lstrip().startswith("{") else Path(config).read_text(encoding="utf-8-sig")
        content = parse_settings(text)
    except OSError as error:
        raise DeepSpeedConfigError(
            f"--deepspeed {config}: cannot be read; give a file of scripts/deepspeed"
        ) from error
    except ValueError as error:
        raise DeepSpeedConfigError(
            f"--deepspeed {config}: not valid JSON ({error}); correct the file"
        ) from error
    if not isinstance(content, dict):
        raise DeepSpeedConfigError(f"--deepspeed {config}: must be a JSON object; correct the file")
    for key in _SECTIONS & content.keys():
        if not isinstance(content[key], dict):
            raise DeepSpeedConfigError(f"--deepspeed {config}: {key} must be a JSON object; correct the file")
    return content


def check_deepspeed_config(config: dict[str, Any], name: str, *, half_precision: str | None) -> None:
    """Refuse a config that ignores a flag or produces folders without weights.

    Args:
        config: from :func:`read_deepspeed_config`.
        name: its name in messages.
        half_precision: ``bf16`` or ``fp16`` if the flags ask for it.

    Raises:
        DeepSpeedConfigError: it omits a value that a flag sets, or ZeRO-3 would save no weights.
    """
    zero = _section(config, "zero_optimization")
    if zero.get("stage") == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"):
        raise DeepSpeedConfigError(
            f"--deepspeed {name}: ZeRO-3 saves no weights without stage3_gather_16bit_weights_on_model_save; "
            "set it to true in zero_optimization"
        )
    needed = {
        "gradient_clipping": "--max_grad_norm",
        "gradient_accumulation_steps": "--gradient_accumulation_steps",
    }
    missing = {key: flag for key, flag in needed.items() if key not in config}
    if half_precision is not None and "enabled" not in _section(config, half_precision):
        missing[f"{half_precision}.enabled"] = f"--{half_precision}"
    optimizer = _section(config, "optimizer")
    if str(optimizer.get("type", "")).lower() in _ADAM:
        given = _section(optimizer, "params")
        missing |= {f"optimizer.params.{key}": flag for key, flag in _ADAM_FLAGS.items() if key not in given}
    if missing:
        key, flag = next(iter(missing.items()))
        raise DeepSpeedConfigError(
            f'--deepspeed {name}: has no {key}, so {flag} would have no effect; set it to "auto"'
        )


def check_values(config: dict[str, Any], name: str) -> None:
    """Let DeepSpeed validate the values now; otherwise it does so after the model is loaded, in many lines.

    Args:
        config: with the flags filled in; values that are still ``"auto"`` depend on the model and are not checked.
        name: its name in messages.

    Raises:
        DeepSpeedConfigError: DeepSpeed refuses it.
    """
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS, DeepSpeedConfig

    if "optimizer" in config:
        optimizer = str(config["optimizer"].get("type"))
        if optimizer.lower() not in DEEPSPEED_OPTIMIZERS:
            if not hasattr(torch.optim, optimizer):
                raise DeepSpeedConfigError(
                    f"--deepspeed {name}: there is no optimizer {optimizer}; give AdamW"
                )
            if _section(config, "zero_optimization").get("stage") and not config.get(_UNTESTED):
                raise DeepSpeedConfigError(
                    f"--deepspeed {name}: {optimizer} is not tested with ZeRO; give AdamW, or set {_UNTESTED} to true"
                )
    known = _without_auto(config)
    known.pop("train_batch_size", None)  # follows from the others and the number of processes
    try:
        DeepSpeedConfig(known)
    except Exception as error:  # pydantic's, assertions and others
        raise DeepSpeedConfigError(
            f"--deepspeed {name}: DeepSpeed refuses it: {' '.join(str(error).split()) or type(error).__name__}"
        ) from error


def _without_auto(config: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if value != "auto"
    }


def builds_optimizer(config: dict[str, Any]) -> bool:
    """Whether DeepSpeed builds the optimizer, with one rate and one weight decay for all parameters."""
    return "optimizer" in config


def use_pytorch_adam(config: dict[str, Any]) -> bool:
    """Make DeepSpeed use PyTorch's Adam, since its own would have to be compiled. True if that is a change."""
    optimizer = _section(config, "optimizer")
    if str(optimizer.get("type", "")).lower() not in _ADAM or _section(optimizer, "params").get("torch_adam"):
        return False
    optimizer["params"] = _section(optimizer, "params") | {"torch_adam": True}
    return True


def published_schedule(
    config: dict[str, Any], name: str, *, warmup_steps: int, max_steps: int
) -> dict[str, Any]:
    """Arguments of our ``warmup_cosine`` that are equivalent to the config's scheduler section.

    Raises:
        DeepSpeedConfigError: a scheduler other than WarmupCosineLR, or steps that differ from the flags'.
    """
    section = _section(config, "scheduler")
    if section.get("type") != "WarmupCosineLR":
        raise DeepSpeedConfigError(
            f"--deepspeed {name}: scheduler {section.get('type')} is not supported; remove the section and choose with "
            "--lr_scheduler_type"
        )
    arguments = dict(_section(section, "params"))
    for key, flag, steps in (
        ("warmup_num_steps", "--warmup_steps", warmup_steps),
        ("total_num_steps", "--max_steps", max_steps),
    ):
        if arguments.pop(key, "auto") not in ("auto", steps):
            raise DeepSpeedConfigError(
                f'--deepspeed {name}: scheduler.params.{key} is not the {steps} of {flag}; set it to "auto"'
            )
    return _DEEPSPEED_WARMUP_COSINE | arguments


def _section(config: dict[str, Any], key: str) -> dict[str, Any]:
    section = config.get(key)
    return section if isinstance(section, dict) else {}
