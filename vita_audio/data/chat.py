"""Messages to token ids and labels, for training and for prompts alike.

One renderer serves both: what the model is asked at inference is, token for token, what it was trained
on. Text is ChatML. A speech reply is interleaved with its text; user and system speech enters as codes,
or, for continuous codecs, as placeholders that the model fills with features. Only assistant turns are
supervised. Rules: sections 2 to 5 of the data specification (tests/goldens/data/SPEC.md); where they
describe a defect of the public code, docs/differences.md says what is done instead.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol

import torch
from tokenizers import AddedToken
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vita_audio.audio import AudioError, AudioLike, is_continuous_kind
from vita_audio.constants import (
    AUDIO_TAG,
    BEGIN_OF_AUDIO,
    CONTEXT_OF_AUDIO,
    DEFAULT_TEXT_AUDIO_RATIO,
    END_OF_AUDIO,
    END_OF_TEXT,
    IGNORE_INDEX,
    IM_END,
    IM_START,
    TTS_PROMPT,
    audio_token,
    special_tokens,
)
from vita_audio.data.interleave import interleave_text_audio
from vita_audio.data.schema import (
    Message,
    Reason,
    Sample,
    SampleError,
    check_messages,
    check_tags,
    parse_sample,
)

QUERY_EMBEDDINGS = 4
"""Embeddings that the SenseVoice encoder puts before the frames (section 4.6)."""


class Codec(Protocol):
    """What rendering needs of a codec."""

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
        default_system_message: put first where the sample has no system message of its own there.

    Raises:
        SampleError: the sample cannot be used; ``reason`` says why.
    """
    if not isinstance(sample, Sample):
        sample = parse_sample(sample)
    messages = _speak_requested_text(sample.messages)
    if default_system_message and messages[0].role != "system":
        messages = [Message("system", default_system_message), *messages]
    return _Renderer(tokenizer, codec, ratio).render(messages, sample.audios)


def build_prompt(
    messages: Sequence[Mapping[str, str]],
    audios: Sequence[AudioLike],
    tokenizer: PreTrainedTokenizerBase,
    codec: Codec | None,
    add_generation_prompt: bool = True,
    *,
    ratio: Sequence[int] | None = DEFAULT_TEXT_AUDIO_RATIO,
) -> Example:
    """Tokenise a conversation for the model to answer, exactly as training would have.

    Args:
        messages: of ``{"role", "content"}``.
        audios: paths or (waveform, rate) pairs, in the order of their tags over all messages.
        tokenizer: extended by :func:`extend_tokenizer`.
        codec: turns the audios into codes and features; None for text alone.
        add_generation_prompt: whether to open the assistant's turn at the end.
        ratio: run lengths of earlier spoken replies.

    Raises:
        SampleError: roles, tags and audios do not fit, or an audio cannot be used.
    """
    sample = Sample(check_messages(list(messages)), tuple(audios))
    check_tags(sample)
    renderer = _Renderer(tokenizer, codec, ratio)
    example = renderer.render(_speak_requested_text(sample.messages), sample.audios)
    if add_generation_prompt:
        opening = renderer.tokens.turn_openings["assistant"]
        example.input_ids += opening
        example.labels += [IGNORE_INDEX] * len(opening)
    return example


def split_reply(ids: Sequence[int] | Tensor, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[int]]:
    """Split generated ids into the reply's text and its speech codes.

    Returns:
        Text without special tokens, and codes in ``[0, codebook_size)``.
    """
    tokens = ChatTokens.of(tokenizer)
    ids = ids.tolist() if isinstance(ids, Tensor) else list(ids)
    codes, text_ids = [], []
    for token in ids:
        code = token - tokens.first_code
        if 0 <= code < tokens.codebook_size:
            codes.append(code)
        else:
            text_ids.append(token)
    return tokenizer.decode(text_ids, skip_special_tokens=True), codes


def extend_tokenizer(tokenizer: PreTrainedTokenizerBase, continuous_input: bool, codebook_size: int) -> int:
    """Add the special and speech tokens, in the order that fixes their ids, and set eos and pad.

    Calling it again changes nothing.

    Args:
        tokenizer: a Qwen2 tokenizer.
        continuous_input: whether user speech enters as features (one more special token).
        codebook_size: speech codes to add.

    Returns:
        Number of tokens added.

    Raises:
        ValueError: the tokenizer was extended for another kind of codec.
    """
    specials = special_tokens(continuous_input)
    codes = [audio_token(code) for code in range(codebook_size)]
    added = tokenizer.add_tokens(
        [AddedToken(token, special=True, normalized=False) for token in specials], special_tokens=True
    )
    # Speech tokens are ordinary tokens: decoding with skip_special_tokens keeps them (section 2).
    added += tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in codes])
    ids = tokenizer.convert_tokens_to_ids([*specials, *codes])
    if ids != list(range(ids[0], ids[0] + len(ids))):
        raise ValueError(
            "the tokenizer already holds speech tokens of another kind or size; "
            "start from the base model's tokenizer"
        )
    tokenizer.eos_token, tokenizer.pad_token = IM_END, END_OF_TEXT
    return added


@dataclass(frozen=True)
class ChatTokens:
    """Ids that rendering needs, looked up once per tokenizer.

    Attributes:
        turn_openings: for each role the ids of ``<|im_start|>ROLE\\n``.
        turn_end: ids of ``<|im_end|>\\n``.
        begin, end: ids of the speech markers.
        context: id of ``<|context_of_audio|>``; None in tokenizers for discrete input.
        first_code: id of ``<|audio_0|>``.
        codebook_size: number of speech tokens.
    """

    turn_openings: dict[str, list[int]]
    turn_end: list[int]
    begin: int
    end: int
    context: int | None
    first_code: int
    codebook_size: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> ChatTokens:
        """Ids of this tokenizer.

        Raises:
            ValueError: it was not extended by :func:`extend_tokenizer`.
        """
        return _chat_tokens(tokenizer, len(tokenizer))


@lru_cache(maxsize=8)
def _chat_tokens(tokenizer: PreTrainedTokenizerBase, _size: int) -> ChatTokens:
    added = tokenizer.get_added_vocab()
    missing = [token for token in (IM_START, IM_END, BEGIN_OF_AUDIO, audio_token(0)) if token not in added]
    if missing:
        raise ValueError(f"the tokenizer has no {' '.join(missing)}; call extend_tokenizer on it first")
    first_code, codebook_size = added[audio_token(0)], 0
    while added.get(audio_token(codebook_size)) == first_code + codebook_size:
        codebook_size += 1
    newline = encode_text(tokenizer, "\n")
    return ChatTokens(
        turn_openings={
            role: [added[IM_START], *encode_text(tokenizer, role), *newline]
            for role in ("system", "user", "assistant")
        },
        turn_end=[added[IM_END], *newline],
        begin=added[BEGIN_OF_AUDIO],
        end=added[END_OF_AUDIO],
        context=added.get(CONTEXT_OF_AUDIO),
        first_code=first_code,
        codebook_size=codebook_size,
    )


_INSIDE_TOKEN_OPENING = re.compile(r"(?<=<)(?=\|)")


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of plain text.

    ``<|im_end|>`` and its like inside a text are text, not control tokens: every such token opens
    with ``<|``, and the two characters are tokenised apart.
    """
    if not text:
        return []
    pieces = _INSIDE_TOKEN_OPENING.split(text) if "<|" in text else [text]
    return [token for piece in pieces for token in tokenizer.encode(piece, add_special_tokens=False)]


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
                self._add_reply(example, message.content, remaining)
            else:
                self._add_given(example, message.content, remaining)
        return example

    def _add_reply(self, example: Example, content: str, audios: Any) -> None:
        """The assistant's content and the end of its turn, supervised."""
        ids: list[int] = []
        for index, text in enumerate(content.split(AUDIO_TAG)):
            if index:
                ids += self._codes(next(audios))
            ids += encode_text(self.tokenizer, text)
        if self.codec is not None:
            ids = interleave_text_audio(ids, self.tokens.begin, self.tokens.end, self.ratio)
        ids += self.tokens.turn_end
        example.input_ids += ids
        example.labels += ids

    def _add_given(self, example: Example, content: str, audios: Any) -> None:
        """A system or user content and the end of its turn, not supervised."""
        continuous = self.codec is not None and is_continuous_kind(self.codec.kind)
        for index, text in enumerate(content.split(AUDIO_TAG)):
            if index and continuous:
                self._add_features(example, next(audios))
            elif index:
                example.input_ids += self._codes(next(audios))
            example.input_ids += encode_text(self.tokenizer, text)
        example.input_ids += self.tokens.turn_end
        example.labels += [IGNORE_INDEX] * (len(example.input_ids) - len(example.labels))

    def _codes(self, audio: AudioLike) -> list[int]:
        """Marked speech tokens of one audio."""
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

    def _add_features(self, example: Example, audio: AudioLike) -> None:
        """Placeholders for one continuous audio, its features and where they go."""
        if self.tokens.context is None:
            raise ValueError(f"the tokenizer has no {CONTEXT_OF_AUDIO}; extend it with continuous_input=True")
        try:
            features = self.codec.features(audio)
        except AudioError as error:
            raise SampleError(f"audio_{error.reason}", str(error)) from error
        if features.ndim != 2 or not torch.isfinite(features).all():
            raise SampleError(Reason.BAD_FEATURES, f"{_name(audio)}: features are not finite or not 2-D")
        if len(features) == 0:
            raise SampleError(Reason.EMPTY_AUDIO, f"{_name(audio)}: too short for a single frame")
        start = len(example.input_ids) + 1
        length = len(features) + QUERY_EMBEDDINGS
        example.input_ids += [self.tokens.begin, *[self.tokens.context] * length, self.tokens.end]
        example.features.append(features)
        example.feature_positions.append(list(range(start, start + length)))


def _speak_requested_text(messages: Sequence[Message]) -> list[Message]:
    """Put the text of each speech-synthesis request before the speech that answers it.

    So the model learns to say a text while it writes it (section 4.1). A request counts for the next
    reply alone, and not where the reply brings the text itself.
    """
    rendered, requested = [], ""
    for message in messages:
        if message.role == "user":
            requested = _requested_text(message.content)
        elif message.role == "assistant":
            if requested and not message.content.startswith(requested):
                message = Message("assistant", requested + message.content)
            requested = ""
        rendered.append(message)
    return rendered


def _requested_text(content: str) -> str:
    if TTS_PROMPT not in content:
        return ""
    for instruction in (f"{TTS_PROMPT}\n", TTS_PROMPT, AUDIO_TAG):
        content = content.replace(instruction, "")
    return content.strip()


def _name(audio: AudioLike) -> str:
    return "in-memory audio" if isinstance(audio, tuple) else str(audio)
