"""From a question to a spoken answer: prompts, generation in rounds, streaming."""

from vita_audio.inference.engine import GenerationOptions, resolve_mode
from vita_audio.inference.pipeline import Reply, SpeechPipeline
from vita_audio.inference.prompts import Conversation
from vita_audio.inference.streaming import AudioChunk, TextDelta, Timings

__all__ = [
    "AudioChunk",
    "Conversation",
    "GenerationOptions",
    "Reply",
    "SpeechPipeline",
    "TextDelta",
    "Timings",
    "resolve_mode",
]
