"""Opens a codec by its kind, without importing the others."""

from __future__ import annotations

from importlib import import_module
from os import PathLike

from vita_audio.audio.base import AudioTokenizer, is_continuous_kind

# kind -> "module:class"; imported on first use, so one codec does not load the libraries of another.
_DISCRETE_CODECS = {
    "glm4voice": "vita_audio.audio.glm4voice:GLM4VoiceTokenizer",
    "mel_vq": "vita_audio.audio.mel_vq:MelVQTokenizer",
}
_CONTINUOUS_PREFIX = "sensevoice_"


def available_kinds() -> list[str]:
    """The kinds that :func:`get_audio_tokenizer` accepts."""
    return [*_DISCRETE_CODECS, *(_CONTINUOUS_PREFIX + kind for kind in _DISCRETE_CODECS)]


def check_kind(kind: str | None) -> None:
    """Refuse an unknown kind of codec.

    Raises:
        ValueError: it is not one of :func:`available_kinds`.
    """
    if kind not in available_kinds():
        raise ValueError(f"unknown audio tokenizer type {kind!r}; known: {', '.join(available_kinds())}")


def get_audio_tokenizer(
    kind: str,
    path: str | PathLike[str] | None = None,
    *,
    flow_path: str | PathLike[str] | None = None,
    frontend_path: str | PathLike[str] | None = None,
    device: str = "cpu",
) -> AudioTokenizer:
    """Open a codec.

    The folders are checked here, by their small files; large weights are loaded on first use.
    A codec with a separate decoder (GLM-4-Voice) opens for encoding only with ``path``, for decoding
    only with ``flow_path``, and for both with both. Any other use is refused in one line.

    Args:
        kind: one of :func:`available_kinds`.
        path: folder of the discrete codec's weights; None to decode only.
        flow_path: folder of the decoder's weights, for codecs with a separate decoder; None to encode only.
        frontend_path: folder of SenseVoice's ``am.mvn``, for continuous kinds; None only without ``path``.
        device: device of the codec.

    Raises:
        ValueError: the kind is unknown, or a folder that it needs is not given, does not exist, is
            incomplete, or holds another kind.
    """
    check_kind(kind)
    if is_continuous_kind(kind):
        from vita_audio.audio.sensevoice import SenseVoiceInputTokenizer

        discrete = get_audio_tokenizer(
            kind.removeprefix(_CONTINUOUS_PREFIX), path, flow_path=flow_path, device=device
        )
        return SenseVoiceInputTokenizer(discrete, frontend_path, decode_only=path is None)
    module_name, class_name = _DISCRETE_CODECS[kind].split(":")
    codec_class = getattr(import_module(module_name), class_name)
    codec: AudioTokenizer = codec_class.from_pretrained(path, flow_path=flow_path, device=device)
    return codec
