"""SenseVoice: continuous features of user speech for the Plus models."""

from vita_audio.audio.sensevoice.encoder import SenseVoiceEncoder, SenseVoiceEncoderConfig
from vita_audio.audio.sensevoice.frontend import Frontend
from vita_audio.audio.sensevoice.tokenizer import SenseVoiceInputTokenizer

__all__ = ["Frontend", "SenseVoiceEncoder", "SenseVoiceEncoderConfig", "SenseVoiceInputTokenizer"]
