"""JSON lines to packed rows: mixing, sharding, packing, loading. Rendering is re-exported from ``chat``."""

from vita_audio.chat import (
    Example,
    SampleError,
    build_example,
    build_prompt,
    extend_tokenizer,
    interleave_text_audio,
    split_reply,
)
from vita_audio.extras import needs_extra

with needs_extra("train"):
    from vita_audio.data.config import DataConfig
    from vita_audio.data.loader import ResumeError, TrainLoader, build_train_loader
    from vita_audio.data.packing import pack_lengths
    from vita_audio.data.report import TooManyBadSamples
    from vita_audio.data.speech import CodecSpec
    from vita_audio.data.validation import ValidationSet, read_validation_set

__all__ = [
    "CodecSpec",
    "DataConfig",
    "Example",
    "ResumeError",
    "SampleError",
    "TooManyBadSamples",
    "TrainLoader",
    "ValidationSet",
    "build_example",
    "build_prompt",
    "build_train_loader",
    "extend_tokenizer",
    "interleave_text_audio",
    "pack_lengths",
    "read_validation_set",
    "split_reply",
]
