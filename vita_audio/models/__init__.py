"""The language model family. Importing it registers the model types with transformers.

Configurations and schedules are imported eagerly. Everything else is imported on first use: transformers' modeling
code takes seconds and 130 MB, which a client of a server, a data job or ``--help`` does not need.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from vita_audio.lazy import LazyClass
from vita_audio.models.configuration import Qwen2MTPConfig, Qwen2MTPSenseVoiceConfig
from vita_audio.models.schedule import SCHEDULES, Schedule, schedules_for

if TYPE_CHECKING:
    from vita_audio.models.cache import MCTPCache
    from vita_audio.models.folder import CheckpointError
    from vita_audio.models.modeling import MTPOutput, Qwen2MTPForCausalLM, Qwen2MTPModel
    from vita_audio.models.modeling_sensevoice import Qwen2MTPSenseVoiceForCausalLM, Qwen2MTPSenseVoiceModel
    from vita_audio.models.open import (
        check_device,
        load_with_heads,
        open_config,
        open_model,
        open_tokenizer,
    )
    from vita_audio.models.weights import (
        freeze_audio_encoder,
        freeze_backbone,
        is_head_parameter,
        resize_vocabulary,
    )

__all__ = [
    "SCHEDULES",
    "CheckpointError",
    "MCTPCache",
    "MTPOutput",
    "Qwen2MTPConfig",
    "Qwen2MTPForCausalLM",
    "Qwen2MTPModel",
    "Qwen2MTPSenseVoiceConfig",
    "Qwen2MTPSenseVoiceForCausalLM",
    "Qwen2MTPSenseVoiceModel",
    "Schedule",
    "check_device",
    "freeze_audio_encoder",
    "freeze_backbone",
    "is_head_parameter",
    "load_with_heads",
    "open_config",
    "open_model",
    "open_tokenizer",
    "resize_vocabulary",
    "schedules_for",
]

_HOMES = {
    "CheckpointError": "folder",
    "MCTPCache": "cache",
    "MTPOutput": "modeling",
    "Qwen2MTPForCausalLM": "modeling",
    "Qwen2MTPModel": "modeling",
    "Qwen2MTPSenseVoiceForCausalLM": "modeling_sensevoice",
    "Qwen2MTPSenseVoiceModel": "modeling_sensevoice",
    "check_device": "open",
    "load_with_heads": "open",
    "open_config": "open",
    "open_model": "open",
    "open_tokenizer": "open",
    "freeze_audio_encoder": "weights",
    "freeze_backbone": "weights",
    "is_head_parameter": "weights",
    "resize_vocabulary": "weights",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


for config_class, backbone, causal_lm in (
    (Qwen2MTPConfig, "Qwen2MTPModel", "Qwen2MTPForCausalLM"),
    (Qwen2MTPSenseVoiceConfig, "Qwen2MTPSenseVoiceModel", "Qwen2MTPSenseVoiceForCausalLM"),
):
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    for auto_class, name in ((AutoModel, backbone), (AutoModelForCausalLM, causal_lm)):
        model_class: Any = LazyClass(__name__, name, config_class=config_class)
        auto_class.register(config_class, model_class, exist_ok=True)
