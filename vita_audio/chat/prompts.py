"""Prompts: a conversation for each task.

The wording matches the training data (sections 1 and 5 of the data specification), so an inference prompt
equals, token for token, a prefix that the model was trained to continue.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from typing import Any

from vita_audio.audio import AudioLike
from vita_audio.chat.sample import Conversation, Message, Reason, Sample, SampleError, parse_sample
from vita_audio.constants import (
    ASR_PROMPT,
    LUKE_SYSTEM_PROMPT,
    OMNI_SYSTEM_PROMPT,
    TTS_PROMPT,
    VOICE_PROMPT,
)

TASKS = ("ASR", "TTS", "voice clone", "speech QA", "text")
"""Every answer of :func:`task_of`."""
SYSTEM_PROMPTS: dict[str, str | None] = {"luke": LUKE_SYSTEM_PROMPT, "omni": OMNI_SYSTEM_PROMPT, "none": None}
"""System messages by name, for command lines."""


def chat(text: str, system: str | None = None) -> Conversation:
    """A typed question."""
    return Conversation((*_system(system), Message("user", (text,))))


def speech_to_speech(
    audio: AudioLike, text: str = "", system: str | None = None, voice: AudioLike | None = None
) -> Conversation:
    """A spoken question, with an optional typed instruction before it.

    Args:
        voice: speech in the voice to answer with; the voice prompt replaces ``system``.
    """
    user = Message("user", (_text(text) + "\n" if text else "", ""))
    if voice is not None:
        return Conversation((_VOICE, user), (voice, audio))
    return Conversation((*_system(system), user), (audio,))


def transcription(audio: AudioLike) -> Conversation:
    """Speech to be written down (ASR)."""
    return Conversation((Message("user", (f"{ASR_PROMPT}\n", "")),), (audio,))


def synthesis(text: str, voice: AudioLike | None = None) -> Conversation:
    """Text to be read aloud (TTS), in the voice of ``voice``. None: the model's own voice."""
    user = Message("user", (f"{TTS_PROMPT}\n" + _text(text),))
    if voice is not None:
        return Conversation((_VOICE, user), (voice,))
    return Conversation((user,))


def from_sample(sample: Sample | Mapping[str, Any], default_system: str | None = None) -> Conversation:
    """The question of a sample: everything before its last assistant message.

    Args:
        sample: checked, or ``messages`` and ``audios`` as in the training data.
        default_system: system message for samples that have none.

    Raises:
        SampleError: the sample has no assistant message to leave out, or cannot be used.
    """
    if not isinstance(sample, Sample):
        sample = parse_sample(sample)
    last_reply = max(index for index, message in enumerate(sample.messages) if message.role == "assistant")
    messages = sample.messages[:last_reply]
    if not messages:
        raise SampleError(Reason.NO_MESSAGES, "no message before the assistant's, so there is no question")
    audios = sample.audios[: sum(message.num_audios for message in messages)]
    if not any(message.role == "system" for message in messages):
        messages = (*_system(default_system), *messages)
    return Conversation(messages, audios)


def task_of(conversation: Conversation) -> str:
    """The task in :data:`TASKS` that the last message sets, or, of a sample, the message before its last reply."""
    if isinstance(conversation, Sample):
        try:
            conversation = from_sample(conversation)
        except SampleError:  # the sample begins with the reply
            return "text"
    question = conversation.messages[-1]
    if TTS_PROMPT in question.text:
        return "voice clone" if _VOICE in conversation.messages else "TTS"
    if ASR_PROMPT in question.text:
        return "ASR"
    return "speech QA" if question.num_audios else "text"


def requested_text(message: Message) -> str:
    """The text that a message asks to be read aloud; empty if it asks for something else."""
    if TTS_PROMPT not in message.text:
        return ""
    return message.text.replace(f"{TTS_PROMPT}\n", "").replace(TTS_PROMPT, "").strip()


def is_blank_request(message: Message) -> bool:
    """Whether a message asks for a text to be read aloud but contains no letter, number or symbol."""
    said = (unicodedata.category(character)[0] in "LNS" for character in requested_text(message))
    return TTS_PROMPT in message.text and not any(said)


def _text(text: str) -> str:
    if not isinstance(text, str):  # or "None" would be read aloud
        raise SampleError(
            Reason.WRONG_TYPE, f"the text must be a string, it is of type {type(text).__name__}"
        )
    return text


_VOICE = Message.of("system", VOICE_PROMPT)


def _system(content: str | None) -> tuple[Message, ...]:
    return (Message("system", (content,)),) if content else ()
