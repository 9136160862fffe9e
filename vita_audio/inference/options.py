"""Options of generation, and the source of those that a caller leaves open."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral
from os import PathLike
from typing import TYPE_CHECKING, Any, get_args

import torch

from vita_audio.audio import check_kind
from vita_audio.chat.prompts import SYSTEM_PROMPTS
from vita_audio.constants import OMNI_SYSTEM_PROMPT
from vita_audio.engine.requests import AudioRowsMode
from vita_audio.engine.weights import Quantization
from vita_audio.models.schedule import Schedule

if TYPE_CHECKING:
    from transformers import GenerationConfig
    from transformers.configuration_utils import PreTrainedConfig

AUTO_SYSTEM = "auto"
"""Used in place of a system message: the message that the model was trained with."""

_MOST_TOKENS = 1 << 31
_NEUTRAL: dict[str, Any] = {
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
}


@dataclass(frozen=True)
class GenerationOptions:
    """How a reply is generated. None: the value in the checkpoint's generation_config.json.

    Attributes:
        mode: name of a schedule (``vanilla``, ``balance``, ``boost``, ``turbo``) or the schedule
            ``[M1, m1, M2, m2, ...]`` itself: tokens by the backbone, then by the heads, in turn. A
            checkpoint without one uses ``boost``, or ``vanilla`` if it has no heads.
        max_new_tokens: maximum length of the reply, text and audio tokens together.
        do_sample: draw tokens instead of taking the most likely one.
        temperature, top_k, top_p: shape of the distribution drawn from; ``top_k=0`` keeps all tokens.
        repetition_penalty: above 1 discourages tokens already generated.
        seed: seed of the draws; each reply gets its own generator. None: a new one each time.
        lossless: the heads draft and the backbone decides: vanilla's reply, faster. The mode is not used then.
        audio_rows: read only the vocabulary's rows of speech: ``off`` never, ``auto`` between the markers of speech,
            ``on`` there and for all tokens of the heads. See the engine's page of the documentation.

    Raises:
        ValueError: a value that is not a number, or out of range.
    """

    mode: str | Sequence[int] | Schedule | None = None
    max_new_tokens: int = 1024
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    lossless: bool = False
    audio_rows: AudioRowsMode = "off"

    def __post_init__(self) -> None:
        for name, least, most in (
            ("max_new_tokens", 1, _MOST_TOKENS),
            ("top_k", 0, _MOST_TOKENS),
            ("seed", -(1 << 63), (1 << 64) - 1),
        ):
            value = getattr(self, name)
            if value is None and name != "max_new_tokens":
                continue
            if isinstance(value, bool) or not isinstance(value, Integral) or not least <= int(value) <= most:
                raise ValueError(f"{name}={value!r}: give a whole number of {least} or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p!r}: give a share above 0 and up to 1")
        if self.audio_rows not in get_args(AudioRowsMode):
            raise ValueError(f"audio_rows={self.audio_rows!r}: use {', '.join(get_args(AudioRowsMode))}")
        if self.do_sample not in (None, True, False):
            raise ValueError(f"do_sample={self.do_sample!r}: give True or False")

    @classmethod
    def greedy(cls, mode: str | Sequence[int] | Schedule | None = None, **changes: Any) -> GenerationOptions:
        """The most likely token at every step and no repetition penalty, regardless of the checkpoint."""
        return replace(cls(mode=mode, **_NEUTRAL), **changes)

    @property
    def schedule(self) -> Schedule:
        """The schedule that ``mode`` names.

        Raises:
            ValueError: there is no such schedule, or ``mode`` is None.
        """
        if self.mode is None:
            raise ValueError("the mode is left to the checkpoint; resolve the options first")
        return Schedule.parse(self.mode)

    def resolved(self, config: GenerationConfig, num_heads: int) -> GenerationOptions:
        """The same options with every field set: from the caller, else the checkpoint, else the neutral value.

        Args:
            config: the checkpoint's generation config.
            num_heads: number of the model's heads.

        Raises:
            ValueError: the mode is not a schedule.
        """
        mode = self.mode
        if mode is None:
            mode = getattr(config, "mtp_inference_mode", None) or ("boost" if num_heads else "vanilla")
        choices: dict[str, Any] = {"mode": Schedule.parse(mode).name}
        for name, neutral in _NEUTRAL.items():
            chosen, stored = getattr(self, name), getattr(config, name, None)
            choices[name] = next((value for value in (chosen, stored) if value is not None), neutral)
        return replace(self, **choices)

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of ``model.generate`` for resolved options. Every option is passed explicitly, so no
        default of the checkpoint applies."""
        arguments: dict[str, Any] = {
            "mtp_inference_mode": self.schedule.numbers,
            "max_new_tokens": self.max_new_tokens,
            "do_sample": self.do_sample,
            "repetition_penalty": self.repetition_penalty,
        }
        if self.do_sample:
            arguments |= {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        return arguments

    def to_dict(self) -> dict[str, Any]:
        """For reports."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return values | {"mode": None if self.mode is None else self.schedule.name}


CHECKPOINT_OPTIONS = GenerationOptions()
"""Every option from the checkpoint's generation_config.json."""


@dataclass(frozen=True)
class CodecOptions:
    """Which codec a model hears and speaks through. None: not given.

    Attributes:
        audio_tokenizer_type: kind of the codec, see ``vita_audio.audio.available_kinds()``.
        audio_tokenizer_path: folder of the speech tokenizer's weights.
        flow_path: folder of the decoder's weights, for codecs that keep them apart.
        frontend_path: SenseVoice folder with am.mvn, for ``sensevoice_*`` kinds.

    Raises:
        ValueError: there is no such kind.
    """

    audio_tokenizer_type: str = "glm4voice"
    audio_tokenizer_path: str | PathLike[str] | None = None
    flow_path: str | PathLike[str] | None = None
    frontend_path: str | PathLike[str] | None = None

    def __post_init__(self) -> None:
        check_kind(self.audio_tokenizer_type)


@dataclass(frozen=True)
class RuntimeOptions:
    """Device, precision and attention of a model. None: the best that this machine supports.

    Attributes:
        device: ``cpu``, ``cuda`` or ``cuda:N``; defaults to this process's GPU, else the CPU.
        dtype: ``float32``, ``bfloat16`` or ``float16``; ``auto`` is the checkpoint's own.
        attn_implementation: ``sdpa``, ``eager``, ``flash_attention_2`` or ``flex_attention``.
        engine: generate with the engine, which copies the weights, or with the loop of ``model.generate``; the
            engine is the default where it can run the model.
        quantization: ``int8`` keeps the engine's weights in 8 bits: half the memory of bfloat16, and faster, on CPUs
            with AVX-512 and on GPUs with Triton; replies may differ. ``none`` keeps the model's type.

    Raises:
        ValueError: a kind of quantization that does not exist, or one without the engine.
    """

    device: str | None = None
    dtype: str | torch.dtype = "auto"
    attn_implementation: str | None = None
    engine: bool | None = None
    quantization: Quantization = "none"

    def __post_init__(self) -> None:
        if self.quantization not in get_args(Quantization):
            raise ValueError(f"quantization={self.quantization!r}: use {', '.join(get_args(Quantization))}")
        if self.quantization != "none" and self.engine is False:
            raise ValueError(f"quantization={self.quantization} needs the engine; leave out engine=False")


def default_system(config: PreTrainedConfig) -> str | None:
    """The system message that a model was trained with; None for none.

    A checkpoint may name it (``system_prompt`` in config.json, empty for none). Otherwise it is the published
    one: none for the GLM-4-Voice family, the Omni message for the SenseVoice family.
    """
    named: str | None = getattr(config, "system_prompt", None)
    if named is not None:
        return named or None
    return OMNI_SYSTEM_PROMPT if getattr(config, "continuous_input", False) else None


def system_message(choice: str | None, config: PreTrainedConfig) -> str | None:
    """The system message for a caller's choice and a model.

    Args:
        choice: ``"auto"`` (see :func:`default_system`), a name (``"luke"``, ``"omni"``, ``"none"``), the
            message itself, or None for none.
    """
    if choice is None:
        return None
    return default_system(config) if choice == AUTO_SYSTEM else SYSTEM_PROMPTS.get(choice, choice)
