"""A sample, as it comes from strangers, checked at the door.

A sample is one JSON object: ``messages`` (or the older ``conversations``) of ``{role, content}``, and
``audios``, one path for each ``<|audio|>`` in reading order. Section 1 of the data specification
(tests/goldens/data/SPEC.md) describes the kinds: speech recognition, speech synthesis, speech QA, voice
cloning, text. What cannot be trained on is refused with a reason code, so that it can be counted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from vita_audio.audio import AudioLike
from vita_audio.constants import AUDIO_TAG


class Reason(StrEnum):
    """Why a sample was left out. The values appear in data_errors.jsonl and in TensorBoard."""

    BAD_JSON = "bad_json"
    WRONG_TYPE = "wrong_type"
    NO_MESSAGES = "no_messages"
    NO_REPLY = "no_reply"
    UNKNOWN_ROLE = "unknown_role"
    MORE_TAGS_THAN_AUDIOS = "more_tags_than_audios"
    FEWER_TAGS_THAN_AUDIOS = "fewer_tags_than_audios"
    BAD_SPANS = "bad_spans"
    BAD_FEATURES = "bad_features"
    BAD_CODES = "bad_codes"
    EMPTY_AUDIO = "empty_audio"
    AUDIO_TOO_LONG = "audio_too_long"
    NO_CODEC = "no_codec"
    TOO_LONG = "too_long"
    UNREADABLE_ROW = "unreadable_row"
    INTERNAL = "internal"


class SampleError(ValueError):
    """A sample that cannot be used.

    Attributes:
        reason: a :class:`Reason` value, or ``"audio_" + AudioError.reason`` for audio that cannot be read.
    """

    def __init__(self, reason: Reason | str, message: str):
        super().__init__(reason, message)
        self.reason = reason.value if isinstance(reason, Reason) else reason

    def __str__(self) -> str:
        return self.args[1]


@dataclass(frozen=True)
class Message:
    """One turn. ``role`` is ``"system"``, ``"user"`` or ``"assistant"``."""

    role: str
    content: str


@dataclass(frozen=True)
class Sample:
    """A checked sample: as many audios as tags, known roles, text contents."""

    messages: tuple[Message, ...]
    audios: tuple[AudioLike, ...] = ()


_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
_MAX_CONTENT_CHARACTERS = 1_000_000
"""Longer contents cannot fit any row and would stall the tokenizer."""


def parse_sample(raw: str | Mapping[str, Any], *, need_reply: bool = True) -> Sample:
    """Check a sample.

    Args:
        raw: a line of JSON, or the object it holds.
        need_reply: whether a sample without an assistant turn is refused (it would train nothing).

    Raises:
        SampleError: with the reason code.
    """
    if isinstance(raw, str):
        raw = _parse_json(raw)
    if not isinstance(raw, Mapping):
        raise SampleError(Reason.WRONG_TYPE, f"a sample must be an object, this is {_kind(raw)}")
    messages = raw.get("messages")
    if raw.get("conversations") is not None:
        messages = raw["conversations"]
    sample = Sample(check_messages(messages), _check_audios(raw.get("audios")))
    if need_reply and not any(message.role == "assistant" for message in sample.messages):
        raise SampleError(Reason.NO_REPLY, "no assistant message, so there is nothing to learn")
    check_tags(sample)
    return sample


def check_tags(sample: Sample) -> None:
    """Every ``<|audio|>`` must have its file, and every file its tag.

    Raises:
        SampleError: the numbers differ.
    """
    tags = sum(message.content.count(AUDIO_TAG) for message in sample.messages)
    if tags != len(sample.audios):
        reason = Reason.MORE_TAGS_THAN_AUDIOS if tags > len(sample.audios) else Reason.FEWER_TAGS_THAN_AUDIOS
        raise SampleError(reason, f"{tags} {AUDIO_TAG} tags for {len(sample.audios)} audios")


def _parse_json(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise SampleError(Reason.BAD_JSON, f"not JSON: {error}; starts {line[:80]!r}") from None


def check_messages(messages: Any) -> tuple[Message, ...]:
    """Check a list of ``{role, content}`` objects.

    Raises:
        SampleError: no messages, unknown roles, contents that are not text.
    """
    if messages is None or messages == []:
        raise SampleError(Reason.NO_MESSAGES, "'messages' is missing or empty")
    if not isinstance(messages, list):
        raise SampleError(Reason.WRONG_TYPE, f"'messages' must be a list, it is {_kind(messages)}")
    return tuple(_check_message(message, index) for index, message in enumerate(messages))


def _check_message(message: Any, index: int) -> Message:
    if not isinstance(message, Mapping):
        raise SampleError(Reason.WRONG_TYPE, f"message {index} must be an object, it is {_kind(message)}")
    # The older key set writes {"from", "value"}.
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    if not isinstance(role, str) or role not in _ROLES:
        raise SampleError(
            Reason.UNKNOWN_ROLE, f"message {index} has role {role!r}; known: {', '.join(_ROLES)}"
        )
    if not isinstance(content, str):
        raise SampleError(
            Reason.WRONG_TYPE, f"content of message {index} must be text, it is {_kind(content)}"
        )
    if len(content) > _MAX_CONTENT_CHARACTERS:
        raise SampleError(Reason.TOO_LONG, f"content of message {index} has {len(content)} characters")
    if not _is_unicode(content):
        raise SampleError(Reason.WRONG_TYPE, f"content of message {index} is not valid Unicode")
    return Message(_ROLES[role], content)


def _check_audios(audios: Any) -> tuple[str, ...]:
    if audios is None:
        return ()
    if isinstance(audios, str):  # one path written without its list
        audios = [audios]
    if not isinstance(audios, list):
        raise SampleError(Reason.WRONG_TYPE, f"'audios' must be a list of paths, it is {_kind(audios)}")
    for index, path in enumerate(audios):
        if not isinstance(path, str) or not path or "\0" in path or not _is_unicode(path):
            raise SampleError(Reason.WRONG_TYPE, f"audio {index} must be a path, it is {path!r:.80}")
    return tuple(audios)


def _is_unicode(text: str) -> bool:
    """False for lone surrogates, which JSON can write and no tokenizer or file system can read."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _kind(value: Any) -> str:
    return "missing" if value is None else f"of type {type(value).__name__}"
