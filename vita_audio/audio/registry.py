"""From a codec's name to the codec, without importing the others."""

from __future__ import annotations

from importlib import import_module
from os import PathLike

from vita_audio.audio.base import AudioTokenizer, is_continuous_kind

# kind -> "module:class"; imported on first use, so that one codec's needs are not another's.
_DISCRETE_CODECS = {
    "glm4voice": "vita_audio.audio.glm4voice:GLM4VoiceTokenizer",
    "mel_vq": "vita_audio.audio.mel_vq:MelVQTokenizer",
}
_CONTINUOUS_PREFIX = "sensevoice_"


def available_kinds() -> list[str]:
    """Names that :func:`get_audio_tokenizer` accepts."""
    return [*_DISCRETE_CODECS, *(_CONTINUOUS_PREFIX + kind for kind in _DISCRETE_CODECS)]


def get_audio_tokenizer(
    kind: str,
    path: str | PathLike[str] | None,
    *,
    flow_path: str | PathLike[str] | None = None,
    frontend_path: str | PathLike[str] | None = None,
    device: str = "cpu",
) -> AudioTokenizer:
    """Open a codec.

    Args:
        kind: one of :func:`available_kinds`.
        path: folder of the discrete codec's weights.
        flow_path: folder of the decoder's weights, for codecs that keep them apart; needed
            only to decode.
        frontend_path: folder holding SenseVoice's ``am.mvn``, for continuous kinds.
        device: where the codec computes.

    Raises:
        ValueError: unknown kind, or a path that this kind needs is missing.
    """
    if kind not in available_kinds():
        raise ValueError(f"unknown audio tokenizer type {kind!r}; known: {', '.join(available_kinds())}")
    if is_continuous_kind(kind):
        from vita_audio.audio.sensevoice import SenseVoiceInputTokenizer

        discrete = get_audio_tokenizer(
            kind.removeprefix(_CONTINUOUS_PREFIX), path, flow_path=flow_path, device=device
        )
        return SenseVoiceInputTokenizer(discrete, frontend_path)
    module_name, class_name = _DISCRETE_CODECS[kind].split(":")
    codec_class = getattr(import_module(module_name), class_name)
    return codec_class.from_pretrained(path, flow_path=flow_path, device=device)
