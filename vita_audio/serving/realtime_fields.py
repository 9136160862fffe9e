"""The events that a client sends over ``/v1/realtime``. Unknown fields and events are refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from vita_audio.serving.fields import Generation, Strict, Voice


class PcmFormat(Strict):
    """The only format of sound: 16-bit mono at 24 kHz."""

    type: Literal["audio/pcm"] = "audio/pcm"
    rate: Literal[24000] = 24000


class ServerVad(Strict):
    """Turns are found by the server."""

    type: Literal["server_vad"] = "server_vad"
    threshold: Annotated[float, Field(gt=0.15, lt=1)] = 0.5
    prefix_padding_ms: Annotated[int, Field(ge=0, le=5000)] = 300
    silence_duration_ms: Annotated[int, Field(ge=32, le=10_000)] = 500
    create_response: bool = True
    interrupt_response: bool = True
    idle_timeout_ms: None = None


class Transcription(Strict):
    """The user's words are sent too; written down by the served model."""

    model: str | None = None
    language: None = None
    prompt: None = None


class AudioInput(Strict):
    """The user's side."""

    format: PcmFormat = PcmFormat()
    turn_detection: ServerVad | None = ServerVad()
    transcription: Transcription | None = None
    noise_reduction: None = None


class AudioOutput(Strict):
    """The model's side."""

    format: PcmFormat = PcmFormat()
    voice: Voice = "default"
    speed: Literal[1] = 1


class Audio(Strict):
    """Both sides."""

    input: AudioInput = AudioInput()
    output: AudioOutput = AudioOutput()


class ResponseAudio(Strict):
    """The model's side, for one response; its voice is the session's."""

    output: AudioOutput | None = None


class Reply(Generation):
    """What a response can choose for itself."""

    output_modalities: list[Literal["text", "audio"]] = Field(default=["audio"], min_length=1, max_length=1)
    max_output_tokens: Annotated[int, Field(ge=1)] | Literal["inf"] = "inf"
    tools: list[Any] = Field(default=[], max_length=0)
    tool_choice: Literal["auto", "none"] = "auto"


class Session(Reply):
    """The session. A field that an update does not hold stays as it is."""

    type: Literal["realtime"] = "realtime"
    model: str | None = None
    instructions: str | None = None
    audio: Audio = Audio()
    tracing: None = None
    truncation: Literal["auto", "disabled"] = "auto"
    include: None = None


class Content(Strict):
    """A part of an item."""

    type: Literal["input_text", "input_audio", "output_text", "output_audio"]
    text: str | None = None
    audio: str | None = None
    transcript: str | None = None


class Message(Strict):
    """An item that a client adds."""

    type: Literal["message"]
    role: Literal["system", "user", "assistant"]
    content: Annotated[list[Content], Field(min_length=1, max_length=64)]
    id: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    object: Literal["realtime.item"] | None = None
    status: Literal["completed", "incomplete", "in_progress"] | None = None


class ClientEvent(Strict):
    """Base of all events."""

    event_id: Annotated[str, Field(max_length=512)] | None = None


class SessionUpdate(ClientEvent):
    type: Literal["session.update"]
    session: dict[str, Any]


class BufferAppend(ClientEvent):
    type: Literal["input_audio_buffer.append"]
    audio: str


class BufferCommit(ClientEvent):
    type: Literal["input_audio_buffer.commit"]


class BufferClear(ClientEvent):
    type: Literal["input_audio_buffer.clear"]


class ItemCreate(ClientEvent):
    type: Literal["conversation.item.create"]
    item: Message
    previous_item_id: str | None = None


class ItemTruncate(ClientEvent):
    type: Literal["conversation.item.truncate"]
    item_id: str
    content_index: Literal[0] = 0
    audio_end_ms: Annotated[int, Field(ge=0)]


class ItemDelete(ClientEvent):
    type: Literal["conversation.item.delete"]
    item_id: str


class ItemRetrieve(ClientEvent):
    type: Literal["conversation.item.retrieve"]
    item_id: str


class ResponseCreate(ClientEvent):
    type: Literal["response.create"]
    response: dict[str, Any] | None = None


class ResponseCancel(ClientEvent):
    type: Literal["response.cancel"]
    response_id: str | None = None


AnyEvent = Annotated[
    SessionUpdate
    | BufferAppend
    | BufferCommit
    | BufferClear
    | ItemCreate
    | ItemTruncate
    | ItemDelete
    | ItemRetrieve
    | ResponseCreate
    | ResponseCancel,
    Field(discriminator="type"),
]

EVENTS: TypeAdapter[AnyEvent] = TypeAdapter(AnyEvent)


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Nested settings with some of them replaced."""
    result = dict(old)
    for name, value in new.items():
        before = result.get(name)
        result[name] = (
            merged(before, value) if isinstance(before, dict) and isinstance(value, dict) else value
        )
    return result
