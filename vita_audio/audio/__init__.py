"""Speech <-> tokens. Knows nothing of text, datasets or language models."""

from vita_audio.audio.base import (
    AudioError,
    AudioLike,
    AudioStream,
    AudioTokenizer,
    EncodeStream,
    FeatureStream,
    is_continuous_kind,
)
from vita_audio.audio.io import audio_duration, load_audio, save_audio
from vita_audio.audio.registry import available_kinds, check_kind, get_audio_tokenizer

__all__ = [
    "AudioError",
    "AudioLike",
    "AudioStream",
    "AudioTokenizer",
    "EncodeStream",
    "FeatureStream",
    "audio_duration",
    "available_kinds",
    "check_kind",
    "get_audio_tokenizer",
    "is_continuous_kind",
    "load_audio",
    "save_audio",
]
