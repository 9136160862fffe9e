"""Conversations in the format of transformers' chat templates.

A message's content is a string, or a list of parts: ``{"type": "text", "text": …}`` and ``{"type": "audio", "audio":
…}`` (``path`` and ``url`` mean the same; nothing is downloaded). Audio is always a part, so an ``<|audio|>`` inside a
text is plain text that somebody typed.

Processors of transformers also write a conversation as one string, in which an ``<|audio|>`` represents an audio:
:func:`write_chatml` and :func:`read_chatml`. Token ids never come from that string: it is parsed back
into a conversation, which :func:`~vita_audio.chat.render.build_prompt` renders.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
from torch import Tensor

from vita_audio.audio import AudioLike
from vita_audio.chat.sample import Conversation, Message, Reason, SampleError, check_messages
from vita_audio.constants import AUDIO_TAG, IM_END, IM_START

_AUDIO_KEYS = ("audio", "path", "url")
_SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")
_TURN = re.compile(rf"{re.escape(IM_START)}(\w+)\n(.*?){re.escape(IM_END)}\n?", re.DOTALL)
_OPENING = f"{IM_START}assistant\n"


def read_content(messages: Sequence[Mapping[str, Any]], sampling_rate: int | None = None) -> Conversation:
    """A conversation from messages whose contents are strings or lists of parts.

    Args:
        messages: ``{"role", "content"}`` objects.
        sampling_rate: of audios that are bare arrays, in Hz.

    Raises:
        SampleError: a role, content or part that cannot be used, or an audio that is not on this machine.
    """
    if not isinstance(messages, (list, tuple)):
        return Conversation(check_messages(messages))  # refuses it
    parts = [_read_parts(message, index, sampling_rate) for index, message in enumerate(messages)]
    checked = check_messages(
        [
            message if texts is None else {**message, "content": "".join(texts)}
            for message, (texts, _) in zip(messages, parts, strict=True)
        ]
    )
    turns = [
        Message(turn.role, (turn.content,) if texts is None else texts)
        for turn, (texts, _) in zip(checked, parts, strict=True)
    ]
    return Conversation(tuple(turns), tuple(audio for _, audios in parts for audio in audios))


def as_clip(audio: Any, sampling_rate: int | None = None) -> AudioLike:
    """An audio in any form that transformers accepts, including ``file://`` URLs and bare arrays at the call's rate.

    Raises:
        SampleError: it is on another machine, or is an array of unknown rate.
    """
    if isinstance(audio, np.ndarray | Tensor):
        if sampling_rate is None:
            raise SampleError(
                "audio_rate", "in-memory audio: an array without its sample rate; give sampling_rate=…"
            )
        return audio, sampling_rate
    if isinstance(audio, str) and _SCHEME.match(audio):
        url = urlsplit(audio)
        if url.scheme.lower() != "file":
            raise SampleError(
                "audio_missing", f"{audio}: not downloaded; save the file and give its path here"
            )
        return unquote(url.path)
    clip: AudioLike = audio
    return clip


def write_chatml(conversation: Conversation, add_generation_prompt: bool) -> str:
    """The conversation as one ChatML string, with an ``<|audio|>`` for each audio.

    Raises:
        SampleError: a text contains ``<|audio|>`` or a turn marker, so it would parse as another conversation.
    """
    for index, message in enumerate(conversation.messages):
        for token in (AUDIO_TAG, IM_START, IM_END):
            if any(token in text for text in message.texts):
                raise SampleError(
                    Reason.BAD_SPANS,
                    f"a text of message {index} contains {token}, which looks like the real token in a string; "
                    "use tokenize=True",
                )
    turns = [f"{IM_START}{message.role}\n{message.content}{IM_END}\n" for message in conversation.messages]
    return "".join(turns) + (_OPENING if add_generation_prompt else "")


def read_chatml(text: str) -> tuple[tuple[Message, ...], bool]:
    """The turns of a string, and whether it ends with an open assistant turn.

    A string without ``<|im_start|>`` is one user message to be answered.

    Raises:
        SampleError: the string has text outside its turns, or a role is unknown.
    """
    if IM_START not in text:
        return check_messages([{"role": "user", "content": text}]), True
    body = text.removesuffix(_OPENING)
    turns = _TURN.findall(body)
    if _TURN.sub("", body) or any(IM_START in content for _, content in turns):
        raise SampleError(
            Reason.BAD_SPANS,
            f"the text is not whole turns of {IM_START}ROLE, newline, content, {IM_END}; use apply_chat_template",
        )
    messages = check_messages([{"role": role, "content": content} for role, content in turns])
    return messages, body != text


def _read_parts(
    message: Any, index: int, sampling_rate: int | None
) -> tuple[tuple[str, ...] | None, list[AudioLike]]:
    """Texts before, between and after the audios of a message, and the audios; None if it has no parts."""
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(content, (list, tuple)):
        return None, []
    texts: list[str] = [""]
    audios: list[AudioLike] = []
    for place, part in enumerate(content):
        where = f"part {place} of message {index}"
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts[-1] += part["text"]
        elif kind == "audio":
            given = [part[key] for key in _AUDIO_KEYS if part.get(key) is not None]
            if len(given) != 1:
                raise SampleError(
                    Reason.WRONG_TYPE, f"{where}: give the audio as one of {', '.join(_AUDIO_KEYS)}"
                )
            audios.append(as_clip(given[0], part.get("sampling_rate", sampling_rate)))
            texts.append("")
        else:
            raise SampleError(
                Reason.WRONG_TYPE,
                f"{where} is {part!r:.60}; known: {{'type': 'text', 'text': …}}, {{'type': 'audio', 'audio': …}}",
            )
    return tuple(texts), audios
