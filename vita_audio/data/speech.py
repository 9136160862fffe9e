"""Codes and features for the loader: from a cache if possible, otherwise from the codec.

The codes of ``DIR/NAME.EXT`` are looked up in the token cache and in the file
``DIR/NAME_CODEC.json`` that the public tools write. If neither has them, the codec computes them; it is opened
on first use, in the worker that needs it. Stored codes are checked before they are used.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from vita_audio.audio import AudioLike, get_audio_tokenizer, is_continuous_kind
from vita_audio.audio.archives import stored_size
from vita_audio.audio.io import audio_duration
from vita_audio.chat.sample import Reason, Sample, SampleError
from vita_audio.constants import AUDIO_CODEBOOK_SIZE
from vita_audio.data.faults import MachineError, first_line
from vita_audio.data.feature_cache import FeatureCache
from vita_audio.data.token_cache import TokenCache, audio_key, discrete_kind, identities


@dataclass(frozen=True)
class CodecSpec:
    """A codec described by its kind and folders: cheap to send to workers, opened where it is used.

    Attributes:
        kind: a registered kind, such as ``"glm4voice"`` or ``"sensevoice_glm4voice"``.
        path: folder of the discrete codec's weights. None: all codes are precomputed.
        frontend_path: folder of SenseVoice's ``am.mvn``, for continuous kinds.
        token_cache: folder of cached codes.
        feature_cache: folder of cached features. None: they are computed each time.
        device: where the codec computes.
    """

    kind: str
    path: str | None = None
    frontend_path: str | None = None
    token_cache: str | None = None
    feature_cache: str | None = None
    device: str = "cpu"

    def codebook_size(self) -> int:
        """Number of speech codes; opens the codec only if neither kind nor cache determines it."""
        if discrete_kind(self.kind) == "glm4voice":
            return AUDIO_CODEBOOK_SIZE
        for _, identity in identities(self.token_cache) if self.token_cache else ():
            if identity.kind == discrete_kind(self.kind):
                return identity.codebook_size
        return self.open_discrete().codebook_size

    def fingerprint(self) -> str | None:
        """Fingerprint of the codec that makes codes; None if its weights are not on this machine."""
        if self.path is None or not Path(self.path).is_dir():
            return None
        return self.open_discrete().fingerprint

    def open_discrete(self) -> Any:
        """The codec that makes codes."""
        return get_audio_tokenizer(discrete_kind(self.kind), self.path, device=self.device)

    def open_frontend(self) -> Any:
        """The feature front end: a callable from audio to (frames, feature_dim)."""
        from vita_audio.audio.sensevoice import Frontend

        if self.frontend_path is None:
            raise ValueError(f"the {self.kind} codec needs frontend_path, the folder of SenseVoice's am.mvn")
        return Frontend(self.frontend_path)


Part = Literal["codes", "features"]
"""The two outputs that a codec computes from speech."""

_HOW_TO_GIVE: dict[Part, str] = {
    "codes": "give the codec's folder (audio_tokenizer_path) or precomputed codes (audio_token_cache)",
    "features": "give SenseVoice's folder (audio_model_name_or_path)",
}


class SpeechReader:
    """The codec that the loader renders with (:class:`vita_audio.chat.Codec`).

    Args:
        codec: a spec, or an open codec.
        cache: precomputed codes. None: there are none.
        data_root: base of the cache's relative paths.
        max_seconds: longer clips are refused before they are read.

    Attributes:
        sources: how many clips came from ``cache``, ``file``, ``codec``; how many features from
            ``feature_cache`` and how many were computed (``features``); and how many cached entries
            were ``stale`` or ``invalid``.
    """

    def __init__(
        self,
        codec: CodecSpec | Any,
        cache: TokenCache | None = None,
        data_root: str | Path = ".",
        max_seconds: float = float("inf"),
    ) -> None:
        self.kind: str = codec.kind
        self._codec = codec
        self._cache = cache
        self._data_root = data_root
        self._max_seconds = max_seconds
        self._discrete: Any = None
        self._frontend: Any = None
        self._feature_cache: FeatureCache | None = None
        self.sources: Counter[str] = Counter()

    def encode(self, audio: AudioLike) -> list[int]:
        """Codes of a file.

        Raises:
            SampleError: it is too long.
            AudioError: it cannot be read.
            MachineError: the codec does not open.
        """
        audio = _path(audio)
        for name, find in (("cache", self._from_cache), ("file", self._from_file)):
            found = find(audio)
            if found is not None:
                self.sources[name] += 1
                return found
        self._check_length(audio)
        if self._discrete is None:
            self._discrete = self._open("codes")
        self.sources["codec"] += 1
        codes: list[int] = self._discrete.encode(audio)
        return codes

    def has_codes(self, audio: str) -> bool:
        """Whether a file's codes are precomputed; counts nothing."""
        found = self._from_cache(audio) is not None or self._from_file(audio) is not None
        self.sources.clear()
        return found

    def features(self, audio: AudioLike) -> Tensor:
        """Continuous features of a file, shape (frames, feature_dim).

        Raises:
            SampleError: it is too long.
            AudioError: it cannot be read.
            MachineError: the front end does not open.
        """
        audio = _path(audio)
        self._check_length(audio)
        if self._frontend is None:
            self._frontend = self._open("features")
            if isinstance(self._codec, CodecSpec) and self._codec.feature_cache is not None:
                self._feature_cache = FeatureCache(self._codec.feature_cache, self._frontend.fingerprint)
        if self._feature_cache is None:
            self.sources["features"] += 1
            return self._frontend(audio)
        key = audio_key(audio, self._data_root)
        size = _size(audio)
        features = self._feature_cache.find(key, size)
        if features is not None:
            self.sources["feature_cache"] += 1
            return features
        self.sources["features"] += 1
        features = self._frontend(audio)
        self._feature_cache.put(key, size, features)
        return features

    def check_opens(self, part: Part, needed: str) -> None:
        """Open the codec or the front end as a check, and discard it.

        Args:
            part: which of the two.
            needed: why it is needed, for the message.

        Raises:
            ValueError: it does not open.
        """
        path = None
        if isinstance(self._codec, CodecSpec):
            path = self._codec.path if part == "codes" else self._codec.frontend_path
            if path is None or not Path(path).exists():
                problem = "no folder is given" if path is None else f"{path}: no such folder"
                raise ValueError(f"{self.kind}: {problem}, and {needed}; {_HOW_TO_GIVE[part]}")
        try:
            self._open(part)
        except MachineError as error:
            raise ValueError(f"{error}; {needed}") from error

    def _open(self, part: Part) -> Any:
        """The codec, or the front end.

        Raises:
            MachineError: it does not open. No sample is at fault, but none can be used.
        """
        if not isinstance(self._codec, CodecSpec):
            return self._codec if part == "codes" else self._codec.features
        try:
            if part == "features":
                return self._codec.open_frontend()
            codec = self._codec.open_discrete()
            codec.load_encoder()  # damaged weights are no clip's fault
            return codec
        except Exception as error:  # any error of a codec's loader
            raise MachineError(
                f"the {self.kind} codec cannot make {part}: {first_line(error)}; {_HOW_TO_GIVE[part]}"
            ) from error

    def _from_cache(self, audio: str) -> list[int] | None:
        clip = self._cache.find_clip(audio_key(audio, self._data_root)) if self._cache is not None else None
        if clip is None:
            return None
        try:
            stale = stored_size(audio) != clip.size
        except OSError:
            stale = False  # the codes suffice; the audio may be missing
        if stale:
            self.sources["stale"] += 1
            return None
        return clip.codes

    def _from_file(self, audio: str) -> list[int] | None:
        path = Path(audio)
        try:
            text = path.with_name(f"{path.stem}_{discrete_kind(self.kind)}.json").read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):  # the folder of an archive's member is the archive
            return None
        except (OSError, ValueError):
            self.sources["invalid"] += 1
            return None
        try:
            codes = json.loads(text)
        except (ValueError, RecursionError):
            codes = None
        if (
            not isinstance(codes, list)
            or not codes
            or not all(type(code) is int and code >= 0 for code in codes)
        ):
            self.sources["invalid"] += 1
            return None
        return codes

    def _check_length(self, audio: str) -> None:
        if self._max_seconds == float("inf"):
            return
        seconds = audio_duration(audio)
        if seconds > self._max_seconds:
            raise SampleError(
                Reason.AUDIO_TOO_LONG, f"{audio}: {seconds:.0f} s, the limit is {self._max_seconds:.0f} s"
            )


def _size(audio: str) -> int:
    try:
        return stored_size(audio)
    except OSError:
        return -1


def _path(audio: AudioLike) -> str:
    if not isinstance(audio, str):
        raise TypeError(f"training reads audio from files, but got an object of type {type(audio).__name__}")
    return audio


def coded_audios(sample: Sample, assistant_only: bool) -> Iterator[str]:
    """The clips of a sample that become codes: only the assistant's if user speech enters as features."""
    audios = iter(sample.audios)
    for message in sample.messages:
        here = islice(audios, message.num_audios)
        yield from (str(audio) for audio in here if message.role == "assistant" or not assistant_only)


def codec_fingerprint(codec: CodecSpec | Any) -> str | None:
    """A value that distinguishes a codec from others of its kind; None if its weights are not on this machine."""
    if isinstance(codec, CodecSpec):
        return codec.fingerprint()
    fingerprint: str | None = getattr(codec, "fingerprint", None)
    return fingerprint


def check_codec_matches(codec: CodecSpec | Any, continuous_tokenizer: bool) -> None:
    """Refuse a text tokenizer that was extended for the other family of codecs.

    Raises:
        ValueError: they do not match.
    """
    if is_continuous_kind(codec.kind) != continuous_tokenizer:
        family = "continuous" if is_continuous_kind(codec.kind) else "discrete"
        raise ValueError(
            f"codec {codec.kind} needs a text tokenizer extended for {family} input; "
            f"call extend_tokenizer(tokenizer, {family == 'continuous'}, codebook_size)"
        )
