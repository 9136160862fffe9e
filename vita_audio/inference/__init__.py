"""From a question to a spoken answer: prompts, generation, streaming.

Importing it registers the processor with transformers.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from vita_audio.chat import Conversation, prompts
from vita_audio.inference.backend import Backend, ReferenceBackend, collect
from vita_audio.inference.engine_backend import EngineBackend
from vita_audio.inference.options import (
    AUTO_SYSTEM,
    CodecOptions,
    GenerationOptions,
    RuntimeOptions,
    default_system,
)
from vita_audio.inference.pipeline import SpeechPipeline
from vita_audio.inference.replies import AudioChunk, Event, Reply, Request, TextDelta, Timings
from vita_audio.inference.session import ChatSession
from vita_audio.lazy import LazyClass, when_imported
from vita_audio.models import (
    SCHEDULES,
    Qwen2MTPConfig,
    Qwen2MTPSenseVoiceConfig,
    Schedule,
    schedules_for,
)

if TYPE_CHECKING:
    from vita_audio.inference.processor import VitaAudioProcessor

__all__ = [
    "AUTO_SYSTEM",
    "SCHEDULES",
    "AudioChunk",
    "Backend",
    "ChatSession",
    "CodecOptions",
    "Conversation",
    "EngineBackend",
    "Event",
    "GenerationOptions",
    "ReferenceBackend",
    "Reply",
    "Request",
    "RuntimeOptions",
    "Schedule",
    "SpeechPipeline",
    "TextDelta",
    "Timings",
    "VitaAudioProcessor",
    "collect",
    "default_system",
    "prompts",
    "schedules_for",
]


def __getattr__(name: str) -> Any:
    if name != "VitaAudioProcessor":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module("vita_audio.inference.processor").VitaAudioProcessor


def _register_processor(transformers_processors: ModuleType) -> None:
    processor: Any = LazyClass("vita_audio.inference.processor", "VitaAudioProcessor")
    for config_class in (Qwen2MTPConfig, Qwen2MTPSenseVoiceConfig):
        transformers_processors.AutoProcessor.register(config_class, processor, exist_ok=True)


# transformers' processors import its modeling code, which not every user needs (see vita_audio/models/__init__.py).
when_imported("transformers.models.auto.processing_auto", _register_processor)
