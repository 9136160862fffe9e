"""Conversations and samples, checked on input.

A sample is one JSON object: ``messages`` (or the older ``conversations``) of ``{role, content}``, and
``audios``, one path for each ``<|audio|>`` in reading order. Section 1 of the data specification
(tests/goldens/data/SPEC.md) describes the kinds: speech recognition, speech synthesis, speech QA, voice
cloning, text. A sample that cannot be used is refused with a reason code, so that refusals can be counted.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from vita_audio.audio import AudioLike
from vita_audio.constants import AUDIO_TAG


class Reason(StrEnum):
    """Why a sample was refused. The values appear in data_errors.jsonl and in TensorBoard."""

    BAD_JSON = "bad_json"
    WRONG_TYPE = "wrong_type"
    NO_MESSAGES = "no_messages"
    NO_REPLY = "no_reply"
    NO_TEXT = "no_text"
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
    """One turn.

    Attributes:
        role: ``"system"``, ``"user"`` or ``"assistant"``.
        texts: the texts before, between and after the turn's audios, so one more than there are
            audios. An ``<|audio|>`` inside one of them is text that somebody typed.
    """

    role: str
    texts: tuple[str, ...]

    @classmethod
    def of(cls, role: str, content: str) -> Message:
        """A turn written as one string, in which every ``<|audio|>`` represents an audio."""
        return cls(role, tuple(content.split(AUDIO_TAG)))

    @property
    def num_audios(self) -> int:
        return len(self.texts) - 1

    @property
    def content(self) -> str:
        """The turn as one string, with an ``<|audio|>`` for each audio."""
        return AUDIO_TAG.join(self.texts)

    @property
    def text(self) -> str:
        """The turn without its audios."""
        return "".join(self.texts)


@dataclass(frozen=True)
class Conversation:
    """Turns, and the audios in them.

    Attributes:
        messages: one or more; given as :class:`Message` or as ``{role, content}``.
        audios: the n-th belongs to the n-th ``<|audio|>`` over all messages.

    Raises:
        SampleError: no messages, an unknown role, content that is not text, or a number of audios that
            differs from the number of tags.
    """

    messages: tuple[Message, ...]
    audios: tuple[AudioLike, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "messages", check_messages(self.messages))
        object.__setattr__(self, "audios", tuple(self.audios))
        tags, audios = sum(message.num_audios for message in self.messages), len(self.audios)
        if tags != audios:
            reason = Reason.MORE_TAGS_THAN_AUDIOS if tags > audios else Reason.FEWER_TAGS_THAN_AUDIOS
            raise SampleError(
                reason, f"{tags} {AUDIO_TAG} tags but {audios} audios; give one audio for each tag"
            )


@dataclass(frozen=True)
class Sample(Conversation):
    """A conversation from a file. Its last reply is the training target or the reference for scoring.

    Attributes:
        id: its name in the file; None if the file gives none.
        answers: accepted answers, if a test set lists several.
    """

    id: str | None = None
    answers: tuple[str, ...] = ()


_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
_MAX_CONTENT_CHARACTERS = 1_000_000
"""Longer contents cannot fit any row and would stall the tokenizer."""


def parse_sample(
    raw: str | Mapping[str, Any], *, need_reply: bool = True, answer_lists: bool = False
) -> Sample:
    """Check a sample. A key whose value is null or empty counts as missing.

    Args:
        raw: a line of JSON, or the object it holds.
        need_reply: whether to refuse a sample without an assistant turn, or with an empty one: it leaves
            nothing to learn and nothing to score.
        answer_lists: accept a list of answers as the content of the last message, as in test sets of spoken
            questions. The first answer then becomes the reply.

    Raises:
        SampleError: the sample cannot be used; ``reason`` holds the code.
    """
    if isinstance(raw, str):
        raw = _parse_json(raw)
    if not isinstance(raw, Mapping):
        raise SampleError(Reason.WRONG_TYPE, f"a sample must be an object, this is {_kind(raw)}")
    messages = _first_present(raw, "conversations", "messages")
    answers = _check_answers(raw.get("answers"))
    if answer_lists:
        messages, listed = _split_answers(messages)
        answers = answers or listed
    turns, audios = check_messages(messages), _check_audios(raw.get("audios"))
    if need_reply:
        _check_replies(turns)
    name = raw.get("id")
    return Sample(turns, audios, None if name in (None, "") else str(name), answers)


def check_messages(messages: Iterable[Message | Mapping[str, Any]] | None) -> tuple[Message, ...]:
    """Check turns given as :class:`Message` or as ``{role, content}`` objects.

    Raises:
        SampleError: no messages, an unknown role, or content that is not text.
    """
    if messages is None or (isinstance(messages, (list, tuple, str)) and not messages):
        raise SampleError(Reason.NO_MESSAGES, "'messages' is missing or empty")
    if not isinstance(messages, (list, tuple)):
        raise SampleError(Reason.WRONG_TYPE, f"'messages' must be a list, it is {_kind(messages)}")
    return tuple(_check_message(message, index) for index, message in enumerate(messages))


def _parse_json(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise SampleError(Reason.BAD_JSON, f"not JSON: {error}; starts {line[:80]!r}") from None


def _check_message(message: Any, index: int) -> Message:
    if isinstance(message, Message):
        for text in message.texts:
            _check_text(text, index)
        return message
    if not isinstance(message, Mapping):
        raise SampleError(Reason.WRONG_TYPE, f"message {index} must be an object, it is {_kind(message)}")
    # The older key set writes {"from", "value"}. A key whose value is null counts as missing.
    role, content = _first_present(message, "role", "from"), _first_present(message, "content", "value")
    if not isinstance(role, str) or role not in _ROLES:
        raise SampleError(
            Reason.UNKNOWN_ROLE, f"message {index} has role {role!r}; known: {', '.join(_ROLES)}"
        )
    return Message.of(_ROLES[role], _check_text(content, index))


def _check_text(content: Any, index: int) -> str:
    if not isinstance(content, str):
        raise SampleError(
            Reason.WRONG_TYPE, f"content of message {index} must be text, it is {_kind(content)}"
        )
    if len(content) > _MAX_CONTENT_CHARACTERS:
        raise SampleError(Reason.TOO_LONG, f"content of message {index} has {len(content)} characters")
    if not _is_unicode(content):
        raise SampleError(Reason.WRONG_TYPE, f"content of message {index} is not valid Unicode")
    return content


def _first_present(entry: Mapping[str, Any], *keys: str) -> Any:
    """The value of the first key that has one. A null or empty value counts as missing."""
    values = [entry[key] for key in keys if entry.get(key) is not None]
    return next((value for value in values if value not in ("", [], {})), values[0] if values else None)


def _check_audios(audios: Any) -> tuple[str, ...]:
    if audios is None or audios == "":
        return ()
    if isinstance(audios, str):  # one path written without its list
        audios = [audios]
    if not isinstance(audios, list):
        raise SampleError(Reason.WRONG_TYPE, f"'audios' must be a list of paths, it is {_kind(audios)}")
    for index, path in enumerate(audios):
        if not isinstance(path, str) or not path or "\0" in path or not _is_unicode(path):
            raise SampleError(Reason.WRONG_TYPE, f"audio {index} must be a path, it is {path!r:.80}")
    return tuple(audios)


def _check_answers(answers: Any) -> tuple[str, ...]:
    if answers is None or answers == []:
        return ()
    if not isinstance(answers, list) or not all(isinstance(one, str) for one in answers):
        raise SampleError(Reason.WRONG_TYPE, f"'answers' must be a list of texts, it is {answers!r:.80}")
    return tuple(answers)


def _split_answers(messages: Any) -> tuple[Any, tuple[str, ...]]:
    """Messages whose last content is text, and the answers if it was a list of them."""
    last = messages[-1] if isinstance(messages, list) and messages else None
    if not isinstance(last, Mapping):
        return messages, ()
    content = _first_present(last, "content", "value")
    if not isinstance(content, list):
        return messages, ()
    if not content:
        raise SampleError(Reason.NO_REPLY, "the last message lists no answers")
    answers = _check_answers(content)
    return [*messages[:-1], {**last, "content": answers[0]}], answers


def _check_replies(messages: Sequence[Message]) -> None:
    replies = [message for message in messages if message.role == "assistant"]
    if not replies:
        raise SampleError(Reason.NO_REPLY, "no assistant message, so there is nothing to learn")
    if not all(reply.num_audios or reply.text.strip() for reply in replies):
        raise SampleError(Reason.NO_REPLY, "an assistant message is empty, so there is nothing to learn")


def _is_unicode(text: str) -> bool:
    """False for lone surrogates, which JSON can express but no tokenizer or file system can read."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _kind(value: Any) -> str:
    return "missing" if value is None else f"of type {type(value).__name__}"
