"""Messages to token ids and labels, for training and for prompts.

One renderer serves both, so inference prompts match the training data token for token. Text is ChatML. A
speech reply is interleaved with its text; user and system speech enters as codes, or, for continuous codecs,
as placeholders that the model fills with features. Only assistant turns are supervised. Rules: sections 2 to 5
of the data specification (tests/goldens/data/SPEC.md). Where they describe a defect of the public code,
docs/differences.md states what this code does instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vita_audio.audio import AudioError, AudioLike, is_continuous_kind
from vita_audio.audio.sensevoice.encoder import NUM_QUERY_FRAMES
from vita_audio.chat.interleave import interleave_text_audio
from vita_audio.chat.prompts import is_blank_request, requested_text
from vita_audio.chat.sample import (
    Conversation,
    Message,
    Reason,
    Sample,
    SampleError,
    check_messages,
    parse_sample,
)
from vita_audio.chat.tokens import ChatTokens, encode_text
from vita_audio.constants import CONTEXT_OF_AUDIO, DEFAULT_TEXT_AUDIO_RATIO, IGNORE_INDEX


class Codec(Protocol):
    """The part of a codec that rendering needs."""

    kind: str

    def encode(self, audio: AudioLike) -> list[int]: ...
    def features(self, audio: AudioLike) -> Tensor: ...


@dataclass
class Example:
    """One document, tokenised.

    Attributes:
        input_ids: token ids.
        labels: the same ids where they are learnt, -100 elsewhere; not shifted.
        features: continuous speech, each of shape (frames, feature_dim), in order of appearance.
        feature_positions: for each of ``features`` the frames + 4 positions that it fills.
    """

    input_ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    features: list[Tensor] = field(default_factory=list)
    feature_positions: list[list[int]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.input_ids)

    def audio_indices(self, row: int = 0, offset: int = 0) -> list[Tensor]:
        """Where ``features`` go in a batch: tensors of shape (2, 1, frames + 4), batch row and position."""
        return [
            torch.stack([torch.full((len(where),), row), torch.tensor(where) + offset]).unsqueeze(1)
            for where in self.feature_positions
        ]


def build_example(
    sample: Mapping[str, Any] | Sample,
    tokenizer: PreTrainedTokenizerBase,
    codec: Codec | None,
    ratio: Sequence[int] | None = DEFAULT_TEXT_AUDIO_RATIO,
    *,
    default_system_message: str | None = None,
) -> Example:
    """Tokenise a training sample.

    Args:
        sample: an object with ``messages`` and ``audios``, or a checked sample.
        tokenizer: extended by :func:`extend_tokenizer`.
        codec: turns the audios into codes and features; None for text alone.
        ratio: text-audio run lengths, see :func:`interleave_text_audio`.
        default_system_message: inserted first in samples that do not begin with a system message.

    Raises:
        SampleError: the sample cannot be used; ``reason`` says why.
    """
    if not isinstance(sample, Sample):
        sample = parse_sample(sample)
    messages = _speak_requested_text(sample.messages)
    if default_system_message and messages[0].role != "system":
        messages = [Message("system", (default_system_message,)), *messages]
    return _Renderer(tokenizer, codec, ratio).render(messages, sample.audios)


def build_prompt(
    messages: Sequence[Message | Mapping[str, str]],
    audios: Sequence[AudioLike],
    tokenizer: PreTrainedTokenizerBase,
    codec: Codec | None,
    add_generation_prompt: bool = True,
    *,
    ratio: Sequence[int] | None = DEFAULT_TEXT_AUDIO_RATIO,
) -> Example:
    """Tokenise a conversation for the model to answer, exactly as training would have.

    Args:
        messages: as :class:`Message` or ``{"role", "content"}``.
        audios: in the order of their tags over all messages.
        tokenizer: extended by :func:`extend_tokenizer`.
        codec: turns the audios into codes and features; None for text alone.
        add_generation_prompt: whether to open the assistant's turn at the end.
        ratio: run lengths of earlier spoken replies.

    Raises:
        SampleError: roles, tags and audios do not match, or an audio cannot be used.
    """
    conversation = Conversation(check_messages(messages), tuple(audios))
    if is_blank_request(conversation.messages[-1]):
        raise SampleError(Reason.NO_TEXT, "the text to be read aloud is blank; provide some words")
    renderer = _Renderer(tokenizer, codec, ratio)
    example = renderer.render(_speak_requested_text(conversation.messages), conversation.audios)
    if add_generation_prompt:
        opening = renderer.tokens.turn_openings["assistant"]
        example.input_ids += opening
        example.labels += [IGNORE_INDEX] * len(opening)
    return example


class _Renderer:
    """Turns checked messages into an :class:`Example`."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, codec: Codec | None, ratio: Sequence[int] | None
    ) -> None:
        self.tokenizer = tokenizer
        self.tokens = ChatTokens.of(tokenizer)
        self.codec = codec
        self.ratio = ratio

    def render(self, messages: Sequence[Message], audios: Sequence[AudioLike]) -> Example:
        example = Example()
        remaining = iter(audios)
        for message in messages:
            opening = self.tokens.turn_openings[message.role]
            example.input_ids += opening
            example.labels += [IGNORE_INDEX] * len(opening)
            if message.role == "assistant":
                self._add_reply(example, message, remaining)
            else:
                self._add_given(example, message, remaining)
        return example

    def _add_reply(self, example: Example, message: Message, audios: Iterator[AudioLike]) -> None:
        """The assistant's content and the end of the turn, supervised."""
        ids: list[int] = []
        for index, text in enumerate(message.texts):
            if index:
                ids += self._codes(next(audios))
            ids += encode_text(self.tokenizer, text)
        if self.codec is not None:
            ids = interleave_text_audio(ids, self.tokens.begin, self.tokens.end, self.ratio)
        ids += self.tokens.turn_end
        example.input_ids += ids
        example.labels += ids

    def _add_given(self, example: Example, message: Message, audios: Iterator[AudioLike]) -> None:
        """The content of a system or user turn and the end of the turn, not supervised."""
        codec = self.codec
        for index, text in enumerate(message.texts):
            if index and codec is not None and is_continuous_kind(codec.kind):
                self._add_features(example, codec, next(audios))
            elif index:
                example.input_ids += self._codes(next(audios))
            example.input_ids += encode_text(self.tokenizer, text)
        example.input_ids += self.tokens.turn_end
        example.labels += [IGNORE_INDEX] * (len(example.input_ids) - len(example.labels))

    def _codes(self, audio: AudioLike) -> list[int]:
        """Speech tokens of one audio, with their begin and end markers."""
        if self.codec is None:
            raise SampleError(Reason.NO_CODEC, "the sample has audio, but no codec is configured")
        try:
            codes = self.codec.encode(audio)
        except AudioError as error:
            raise SampleError(f"audio_{error.reason}", str(error)) from error
        if not codes:
            raise SampleError(Reason.EMPTY_AUDIO, f"{_name(audio)}: the codec returned no codes")
        if not all(isinstance(code, int) and 0 <= code < self.tokens.codebook_size for code in codes):
            raise SampleError(
                Reason.BAD_CODES,
                f"{_name(audio)}: codes must be whole numbers in [0, {self.tokens.codebook_size})",
            )
        first = self.tokens.first_code
        return [self.tokens.begin, *(first + code for code in codes), self.tokens.end]

    def _add_features(self, example: Example, codec: Codec, audio: AudioLike) -> None:
        """Placeholders for one continuous audio, its features and their positions."""
        if self.tokens.context is None:
            raise ValueError(f"the tokenizer has no {CONTEXT_OF_AUDIO}; extend it with continuous_input=True")
        try:
            features = codec.features(audio)
        except AudioError as error:
            raise SampleError(f"audio_{error.reason}", str(error)) from error
        if features.ndim != 2 or not torch.isfinite(features).all():
            raise SampleError(Reason.BAD_FEATURES, f"{_name(audio)}: features are not finite or not 2-D")
        if len(features) == 0:
            raise SampleError(Reason.EMPTY_AUDIO, f"{_name(audio)}: too short for a single frame")
        start = len(example.input_ids) + 1
        length = len(features) + NUM_QUERY_FRAMES
        example.input_ids += [self.tokens.begin, *[self.tokens.context] * length, self.tokens.end]
        example.features.append(features)
        example.feature_positions.append(list(range(start, start + length)))


def _speak_requested_text(messages: Sequence[Message]) -> list[Message]:
    """Insert the text of each speech-synthesis request before the speech that answers it.

    The model thus learns to speak a text while writing it (section 4.1). A request applies to the next
    reply only, and not if that reply already contains text.
    """
    rendered, requested = [], ""
    for message in messages:
        if message.role == "user":
            requested = requested_text(message)
        elif message.role == "assistant":
            first, *others = message.texts
            if requested and not first.startswith(requested):
                message = Message("assistant", (requested + first, *others))
            requested = ""
        rendered.append(message)
    return rendered


def _name(audio: AudioLike) -> str:
    return "in-memory audio" if isinstance(audio, tuple) else str(audio)
