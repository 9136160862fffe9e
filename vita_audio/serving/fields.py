"""The bodies of requests. Unknown fields are refused, and so are values that would be ignored.

Fields with OpenAI's names mean what they mean there. The fields of :class:`Generation` are ours; the official client
sends them as ``extra_body``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vita_audio.engine.requests import AudioRowsMode
from vita_audio.inference import GenerationOptions
from vita_audio.serving.errors import ApiError, invalid
from vita_audio.serving.sounds import SoundFormat

Fields = TypeVar("Fields", bound=BaseModel)


class Strict(BaseModel):
    """Base of all bodies."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Generation(Strict):
    """How a reply is generated; see :class:`~vita_audio.inference.GenerationOptions`. None: the checkpoint's choice."""

    mode: str | list[int] | None = None
    lossless: bool = False
    audio_rows: AudioRowsMode = "off"
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    max_new_tokens: Annotated[int, Field(ge=1)] | None = None

    def options(self, most_tokens: int, length: int | None = None) -> GenerationOptions:
        """As the pipeline's options. A temperature of 0 is greedy; any other one draws.

        Args:
            most_tokens: the server's limit.
            length: the longest reply by another field of the request.

        Raises:
            ApiError: the mode is no schedule.
        """
        sampled = None if self.temperature is None else self.temperature > 0
        try:
            options = GenerationOptions(
                mode=self.mode,
                max_new_tokens=min(most_tokens, length or self.max_new_tokens or most_tokens),
                do_sample=sampled,
                temperature=self.temperature if sampled else None,
                top_k=self.top_k,
                top_p=self.top_p,
                repetition_penalty=self.repetition_penalty,
                seed=self.seed,
                lossless=self.lossless,
                audio_rows=self.audio_rows,
            )
            if self.mode is not None:
                _ = options.schedule
        except ValueError as error:
            raise ApiError(f"mode: {error}", "mode", code="invalid_value") from error
        return options


class VoiceId(Strict):
    """A voice as an object."""

    id: str


Voice = str | VoiceId


def voice_name(voice: Voice) -> str:
    """The name of a voice in either form."""
    return voice if isinstance(voice, str) else voice.id


class SpeechBody(Generation):
    """``POST /v1/audio/speech``. ``voice_audio`` is a clip in base64 whose voice is used instead of ``voice``."""

    model: str
    input: Annotated[str, Field(min_length=1)]
    voice: Voice = "default"
    voice_audio: str | None = None
    response_format: SoundFormat = "mp3"
    stream_format: Literal["audio", "sse"] = "audio"
    speed: Literal[1] | None = None


class TranscriptionFields(Generation):
    """``POST /v1/audio/transcriptions``: the fields beside the file."""

    model: str
    response_format: Literal["json", "text"] = "json"
    stream: bool = False


class TextPart(Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class InputAudio(Strict):
    """A clip in base64; the format is read from the clip itself."""

    data: str
    format: Literal["wav", "mp3", "flac", "opus", "ogg"]


class AudioPart(Strict):
    """A clip in a message."""

    type: Literal["input_audio"]
    input_audio: InputAudio


Part = Annotated[TextPart | AudioPart, Field(discriminator="type")]


class ChatMessage(Strict):
    """One turn. The assistant's earlier replies are given as text."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: str | None = None


class ChatAudio(Strict):
    """How a reply sounds."""

    format: Literal["wav", "flac", "mp3", "opus", "pcm16"] = "wav"
    voice: Voice = "default"


class StreamOptions(Strict):
    """What a stream holds besides the reply."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class TextFormat(Strict):
    """The only format of text."""

    type: Literal["text"]


class ChatBody(Generation):
    """``POST /v1/chat/completions``. ``voice_audio`` is a clip in base64 whose voice is used."""

    model: str
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=256)]
    modalities: list[Literal["text", "audio"]] = Field(default=["text"])
    audio: ChatAudio | None = None
    voice_audio: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Literal[1] | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    logprobs: Literal[False] | None = None
    response_format: TextFormat | None = None
    store: Literal[False] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    metadata: dict[str, str] | None = None


async def read_json(request: Request, kind: type[Fields]) -> Fields:
    """The body of a request.

    Raises:
        ApiError: it is not JSON, or a field is unknown, missing or wrong.
    """
    # Pages of other sites can send other types without asking first.
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise ApiError("the body must be of the type application/json", None, 415)
    return check(kind, await request.body())


def check(kind: type[Fields], given: bytes | str | dict[str, Any]) -> Fields:
    """Fields from JSON, or from the texts of a form.

    Raises:
        ApiError: a field is unknown, missing or wrong.
    """
    try:
        return kind.model_validate(given) if isinstance(given, dict) else kind.model_validate_json(given)
    except ValidationError as error:
        raise invalid(error) from None
