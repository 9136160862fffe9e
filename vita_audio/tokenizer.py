"""The codec interface of the original repository, for code written against it.

    from vita_audio.tokenizer import get_audio_tokenizer

    tokenizer = get_audio_tokenizer("models/THUDM/glm-4-voice-tokenizer", "glm4voice", flow_path="models/…")
    waveform = tokenizer.decode(tokenizer.encode("speech.wav"))

New code should use :func:`vita_audio.audio.get_audio_tokenizer`.
"""

from __future__ import annotations

from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vita_audio import audio
from vita_audio.audio import AudioLike, AudioTokenizer, check_kind, is_continuous_kind
from vita_audio.distributed import local_rank

_ASSISTANT_ROLES = ("assistant", "gpt")
_USER_ROLES = ("user", "human")
_RELEASED_FRONTEND = Path("FunAudioLLM", "SenseVoiceSmall")


def get_audio_tokenizer(
    model_name_or_path: str | PathLike[str],
    audio_tokenizer_type: str,
    flow_path: str | PathLike[str] | None = None,
    rank: int | None = None,
) -> OriginalAudioTokenizer:
    """A codec with the original's methods. It is opened on first use or by ``load_model()``.

    Args:
        model_name_or_path: folder of the speech tokenizer's weights.
        audio_tokenizer_type: one of ``vita_audio.audio.available_kinds()``.
        flow_path: folder of the decoder's weights; None to encode only.
        rank: number of the GPU; None for this process's own. Without GPUs the codec computes on the CPU.

    Raises:
        ValueError: there is no such kind of codec.
    """
    check_kind(audio_tokenizer_type)
    return OriginalAudioTokenizer(model_name_or_path, audio_tokenizer_type, flow_path, rank)


class OriginalAudioTokenizer:
    """A codec with the original's method names; arguments as in :func:`get_audio_tokenizer`.

    Attributes:
        is_discrete: whether it makes codes; true for every kind.
        is_contiguous: whether it also makes continuous features; true for ``sensevoice_*`` kinds.
    """

    is_discrete = True

    def __init__(
        self,
        path: str | PathLike[str],
        kind: str,
        flow_path: str | PathLike[str] | None = None,
        rank: int | None = None,
    ) -> None:
        self.is_contiguous = is_continuous_kind(kind)
        self._path = path
        self._kind = kind
        self._flow_path = flow_path
        self._rank = rank

    def load_model(self) -> None:
        """Open the codec.

        Raises:
            ValueError: a folder is missing, incomplete or of another kind.
        """
        _ = self.codec

    @cached_property
    def codec(self) -> AudioTokenizer:
        """The codec itself."""
        rank = local_rank() if self._rank is None else self._rank
        return audio.get_audio_tokenizer(
            self._kind,
            self._path,
            flow_path=self._flow_path,
            frontend_path=find_frontend(self._path) if self.is_contiguous else None,
            device=f"cuda:{rank}" if torch.cuda.is_available() else "cpu",
        )

    def encode(
        self, audio_path: AudioLike, is_discrete: bool = False, is_contiguous: bool = True, **_: Any
    ) -> list[int] | Tensor:
        """Codes in ``[0, codebook_size)``, or features of shape (frames, feature_dim).

        Kinds with features return them unless ``is_discrete`` asks for codes; the others always return codes.

        Raises:
            AudioError: the audio cannot be read.
        """
        if self.is_contiguous and is_contiguous and not is_discrete:
            return self.codec.features(audio_path)
        return self.codec.encode(audio_path)

    def decode(self, audio_tokens: list[int] | Tensor, option_steps: int = 10, **_: Any) -> Tensor:
        """Speech of shape (samples,), float32, from codes; ``option_steps`` are the solver's.

        Raises:
            ValueError: a code is out of range, or the codec was opened without a decoder.
        """
        codes = audio_tokens.flatten().tolist() if isinstance(audio_tokens, Tensor) else list(audio_tokens)
        return self.codec.decode(codes, steps=option_steps)

    def apply_to_role(
        self, role: str, is_discrete: bool = False, is_contiguous: bool = False, **_: Any
    ) -> bool:
        """Whether the audio of a role's turns enters as codes or as features (sensevoice/SPEC.md, role rule)."""
        if not self.is_contiguous:
            return is_discrete
        return (is_discrete and role in _ASSISTANT_ROLES) or (is_contiguous and role in _USER_ROLES)


def find_frontend(codec: str | PathLike[str], *others: str | PathLike[str]) -> Path:
    """SenseVoice's folder: one of the given ones, or the sibling folder where the released models are stored.

    Raises:
        ValueError: none of them contains am.mvn.
    """
    beside = Path(codec).resolve().parent.parent / _RELEASED_FRONTEND
    for folder in (*map(Path, others), Path(codec), beside):
        if (folder / "am.mvn").is_file():
            return folder
    raise ValueError(f"{beside}: no am.mvn there; sensevoice_* codecs need the folder of SenseVoiceSmall")
