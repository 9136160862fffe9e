"""What is asked of the model: a conversation for each task.

The wording is what the training data uses (sections 1 and 5 of the data specification), so
that a prompt at inference is token for token what the model was trained to continue.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vita_audio.audio import AudioLike
from vita_audio.constants import (
    ASR_PROMPT,
    AUDIO_TAG,
    LUKE_SYSTEM_PROMPT,
    OMNI_SYSTEM_PROMPT,
    TTS_PROMPT,
    VOICE_PROMPT,
)

SYSTEM_PROMPTS: dict[str, str | None] = {"luke": LUKE_SYSTEM_PROMPT, "omni": OMNI_SYSTEM_PROMPT, "none": None}
"""System messages by name, for command lines."""


@dataclass(frozen=True)
class Conversation:
    """Messages that await an answer.

    Attributes:
        messages: ``{"role": ..., "content": ...}`` in order, the last one the user's.
        audios: the n-th belongs to the n-th ``<|audio|>`` in the messages.
    """

    messages: Sequence[Mapping[str, str]]
    audios: Sequence[AudioLike] = field(default=())

    def __post_init__(self) -> None:
        tags = sum(message["content"].count(AUDIO_TAG) for message in self.messages)
        if tags != len(self.audios):
            raise ValueError(
                f"the messages hold {tags} {AUDIO_TAG} tags but {len(self.audios)} audios are given; "
                "give one audio per tag"
            )


def chat(text: str, system: str | None = None) -> Conversation:
    """A typed question."""
    return Conversation([*_system(system), _user(text)])


def speech_to_speech(
    audio: AudioLike, text: str = "", system: str | None = None, voice: AudioLike | None = None
) -> Conversation:
    """A spoken question, with an optional typed instruction before it.

    Args:
        voice: speech whose voice the answer takes; its prompt replaces ``system``.
    """
    user = _user(f"{text}\n{AUDIO_TAG}" if text else AUDIO_TAG)
    if voice is not None:
        return Conversation([*_system(VOICE_PROMPT), user], [voice, audio])
    return Conversation([*_system(system), user], [audio])


def transcription(audio: AudioLike) -> Conversation:
    """Speech to be written down (ASR)."""
    return Conversation([_user(f"{ASR_PROMPT}\n{AUDIO_TAG}")], [audio])


def synthesis(text: str, voice: AudioLike | None = None) -> Conversation:
    """Text to be read aloud (TTS), in the voice of ``voice`` if given."""
    user = _user(f"{TTS_PROMPT}\n{text}")
    if voice is not None:
        return Conversation([*_system(VOICE_PROMPT), user], [voice])
    return Conversation([user])


def from_sample(sample: Mapping[str, Any], default_system: str | None = None) -> Conversation:
    """The question of a data sample: everything before its last assistant message.

    Args:
        sample: ``messages`` and ``audios`` as in the training data.
        default_system: system message for samples that have none.

    Raises:
        ValueError: no assistant message to leave out, or tags and audios do not match.
    """
    messages, audios = list(sample["messages"]), list(sample.get("audios") or ())
    answers = [index for index, message in enumerate(messages) if message["role"] in ("assistant", "gpt")]
    if not answers:
        raise ValueError("the sample has no assistant message; its question cannot be told from its answer")
    messages = messages[: answers[-1]]
    tags = sum(message["content"].count(AUDIO_TAG) for message in messages)
    if default_system and not any(message["role"] == "system" for message in messages):
        messages = [*_system(default_system), *messages]
    return Conversation(messages, audios[:tags])


def _system(content: str | None) -> list[dict[str, str]]:
    return [{"role": "system", "content": content}] if content else []


def _user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}
