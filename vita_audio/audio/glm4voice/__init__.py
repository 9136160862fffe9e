"""The GLM-4-Voice speech tokenizer and decoder, in plain PyTorch."""

from vita_audio.audio.glm4voice.flow import FlowDecoder
from vita_audio.audio.glm4voice.streaming import (
    GLM4VoiceStream,
    NoiseSource,
    StreamingDecoder,
    StreamSchedule,
    StreamState,
)
from vita_audio.audio.glm4voice.tokenizer import GLM4VoiceTokenizer
from vita_audio.audio.glm4voice.vocoder import Vocoder
from vita_audio.audio.glm4voice.vq_encoder import EncoderStream, VQEncoder

__all__ = [
    "EncoderStream",
    "FlowDecoder",
    "GLM4VoiceStream",
    "GLM4VoiceTokenizer",
    "NoiseSource",
    "StreamSchedule",
    "StreamState",
    "StreamingDecoder",
    "VQEncoder",
    "Vocoder",
]
