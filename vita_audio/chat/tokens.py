"""The tokens of a conversation: what is added to the base tokenizer, and the ids that rendering and parsing need."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from vita_audio.constants import (
    BEGIN_OF_AUDIO,
    CONTEXT_OF_AUDIO,
    END_OF_AUDIO,
    END_OF_TEXT,
    IM_END,
    IM_START,
    audio_token,
    special_tokens,
)


def extend_tokenizer(tokenizer: PreTrainedTokenizerBase, continuous_input: bool, codebook_size: int) -> int:
    """Add the special and speech tokens, in the order that determines their ids, and set eos and pad.

    Calling it again changes nothing.

    Args:
        tokenizer: a Qwen2 tokenizer.
        continuous_input: whether user speech enters as features (one more special token).
        codebook_size: speech codes to add.

    Returns:
        Number of tokens added.

    Raises:
        ValueError: the tokenizer was already extended for another kind of codec.
    """
    specials = special_tokens(continuous_input)
    codes = [audio_token(code) for code in range(codebook_size)]
    added = tokenizer.add_tokens(
        [AddedToken(token, special=True, normalized=False) for token in specials], special_tokens=True
    )
    # Speech tokens are ordinary tokens: decoding with skip_special_tokens keeps them (section 2).
    added += tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in codes])
    vocabulary = tokenizer.get_vocab()
    ids = [vocabulary[token] for token in (*specials, *codes)]
    if ids != list(range(ids[0], ids[0] + len(ids))):
        raise ValueError(
            "the tokenizer already holds speech tokens of another kind or size; "
            "start from the base model's tokenizer"
        )
    tokenizer.eos_token, tokenizer.pad_token = IM_END, END_OF_TEXT
    return added


@dataclass(frozen=True)
class ChatTokens:
    """Token ids that rendering needs, looked up once per tokenizer.

    Attributes:
        turn_openings: for each role the ids of ``<|im_start|>ROLE\\n``.
        turn_end: ids of ``<|im_end|>\\n``.
        begin, end: ids of the speech markers.
        context: id of ``<|context_of_audio|>``; None in tokenizers for discrete input.
        first_code: id of ``<|audio_0|>``.
        codebook_size: number of speech tokens.
        pad: fills the unused part of a row.
        stops: ids that end a reply.
    """

    turn_openings: dict[str, list[int]]
    turn_end: list[int]
    begin: int
    end: int
    context: int | None
    first_code: int
    codebook_size: int
    pad: int
    stops: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> ChatTokens:
        """Ids of this tokenizer.

        Raises:
            ValueError: it was not extended by :func:`extend_tokenizer`.
        """
        return _chat_tokens(tokenizer, len(tokenizer))


@lru_cache(maxsize=8)
def _chat_tokens(tokenizer: PreTrainedTokenizerBase, _size: int) -> ChatTokens:
    vocabulary = tokenizer.get_vocab()
    needed = (IM_START, IM_END, END_OF_TEXT, BEGIN_OF_AUDIO, audio_token(0))
    missing = [token for token in needed if token not in vocabulary]
    if missing:
        raise ValueError(f"the tokenizer has no {' '.join(missing)}; call extend_tokenizer on it first")
    first_code, codebook_size = vocabulary[audio_token(0)], 0
    while vocabulary.get(audio_token(codebook_size)) == first_code + codebook_size:
        codebook_size += 1
    newline = encode_text(tokenizer, "\n")
    return ChatTokens(
        turn_openings={
            role: [vocabulary[IM_START], *encode_text(tokenizer, role), *newline]
            for role in ("system", "user", "assistant")
        },
        turn_end=[vocabulary[IM_END], *newline],
        begin=vocabulary[BEGIN_OF_AUDIO],
        end=vocabulary[END_OF_AUDIO],
        context=vocabulary.get(CONTEXT_OF_AUDIO),
        first_code=first_code,
        codebook_size=codebook_size,
        pad=vocabulary[END_OF_TEXT],
        stops=(vocabulary[IM_END], vocabulary[END_OF_TEXT]),
    )


_INSIDE_TOKEN_OPENING = re.compile(r"(?<=<)(?=\|)")


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of plain text.

    Special tokens such as ``<|im_end|>`` inside a text are text, not control tokens: each of them begins
    with ``<|``, and the two characters are tokenised separately.
    """
    if not text:
        return []
    pieces = _INSIDE_TOKEN_OPENING.split(text) if "<|" in text else [text]
    return [token for piece in pieces for token in tokenizer.encode(piece, add_special_tokens=False)]
