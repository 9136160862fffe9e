"""From a question to a spoken answer: prompts, generation, streaming."""

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
from vita_audio.models.schedule import SCHEDULES, Schedule

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
    "collect",
    "default_system",
    "prompts",
]
