"""From a question to a spoken answer: prompts, generation, streaming.

Importing it registers the processor with transformers.
"""

from transformers import AutoProcessor

from vita_audio.chat import Conversation, prompts
from vita_audio.inference.backend import (
    AudioChunk,
    Backend,
    Event,
    ReferenceBackend,
    Reply,
    Request,
    TextDelta,
    Timings,
    collect,
)
from vita_audio.inference.options import (
    AUTO_SYSTEM,
    CodecOptions,
    GenerationOptions,
    RuntimeOptions,
    default_system,
)
from vita_audio.inference.pipeline import SpeechPipeline
from vita_audio.inference.processor import VitaAudioProcessor
from vita_audio.models import Qwen2MTPConfig, Qwen2MTPSenseVoiceConfig
from vita_audio.models.schedule import SCHEDULES, Schedule

for config_class in (Qwen2MTPConfig, Qwen2MTPSenseVoiceConfig):
    AutoProcessor.register(config_class, VitaAudioProcessor, exist_ok=True)

__all__ = [
    "AUTO_SYSTEM",
    "SCHEDULES",
    "AudioChunk",
    "Backend",
    "CodecOptions",
    "Conversation",
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
]
