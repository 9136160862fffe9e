"""JSON lines to packed rows: schema, chat, interleaving, mixing, packing, loading."""

from vita_audio.data.chat import Example, build_example, build_prompt, extend_tokenizer, split_reply
from vita_audio.data.interleave import interleave_text_audio
from vita_audio.data.loader import DataConfig, ResumeError, TrainLoader, build_train_loader
from vita_audio.data.packing import pack_lengths
from vita_audio.data.report import TooManyBadSamples
from vita_audio.data.schema import SampleError
from vita_audio.data.speech import CodecSpec

__all__ = [
    "CodecSpec",
    "DataConfig",
    "Example",
    "ResumeError",
    "SampleError",
    "TooManyBadSamples",
    "TrainLoader",
    "build_example",
    "build_prompt",
    "build_train_loader",
    "extend_tokenizer",
    "interleave_text_audio",
    "pack_lengths",
    "split_reply",
]
