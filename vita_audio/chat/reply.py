"""Splits the token ids of a reply into text and speech codes, incrementally or all at once.

The model emits one stream of ids in which text and speech codes alternate. :class:`ReplyParser` sorts them one
by one. A whole reply is the concatenation of its results, so streamed and whole replies cannot differ.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vita_audio.chat.tokens import ChatTokens
from vita_audio.constants import IGNORE_INDEX

CHUNK_CODES = 8
"""Codes in one chunk: a schedule's ``10`` minus the two markers."""

Piece = str | tuple[int, ...]
"""Text, or a chunk of speech codes in ``[0, codebook_size)``."""


class ReplyParser:
    """Sorts the ids of one reply, one at a time, into text and chunks of speech codes.

    Args:
        tokenizer: extended by :func:`~vita_audio.chat.tokens.extend_tokenizer`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._tokens = ChatTokens.of(tokenizer)
        self._num_tokens = len(tokenizer)
        self._held_text: list[int] = []
        self._held_codes: list[int] = []

    def push(self, token: int) -> Piece | None:
        """The pieces that this token completes: text, a chunk of codes, or nothing yet.

        Raises:
            ValueError: see :func:`check_token_id`.
        """
        check_token_id(token)
        code = token - self._tokens.first_code
        if 0 <= code < self._tokens.codebook_size:
            self._held_codes.append(code)
            return self._take_codes() if len(self._held_codes) >= CHUNK_CODES else None
        if token == self._tokens.end:
            return self._take_codes() or None
        if token >= self._num_tokens:  # a padding row of the embedding names no token
            return None
        self._held_text.append(token)
        text = self._decode_text()
        if text.endswith("\ufffd"):  # the middle of a character of several bytes
            return None
        self._held_text.clear()
        return text or None

    def flush(self) -> tuple[str, tuple[int, ...]]:
        """Text and codes still held when the reply ends."""
        text, codes = self._decode_text(), self._take_codes()
        self._held_text.clear()
        return text, codes

    def _decode_text(self) -> str:
        text = self._tokenizer.decode(
            self._held_text, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text

    def _take_codes(self) -> tuple[int, ...]:
        codes = tuple(self._held_codes)
        self._held_codes.clear()
        return codes


def check_token_id(token: int) -> None:
    """Refuse an id that no tokenizer has, such as -100 in labels.

    Raises:
        ValueError: the id is negative, or has more than 31 bits.
    """
    if not 0 <= token < 1 << 31:
        raise ValueError(
            f"token id {token} is not valid; give ids of 0 or more (in labels, replace {IGNORE_INDEX})"
        )


def split_reply(ids: Sequence[int] | Tensor, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[int]]:
    """Split generated ids into the reply's text and its speech codes.

    Returns:
        Text without special tokens, and codes in ``[0, codebook_size)``.

    Raises:
        ValueError: see :func:`check_token_id`.
    """
    parser = ReplyParser(tokenizer)
    pieces = [parser.push(token) for token in (ids.tolist() if isinstance(ids, Tensor) else ids)]
    pieces += [*parser.flush()]
    text = "".join(piece for piece in pieces if isinstance(piece, str))
    return text, [code for piece in pieces if isinstance(piece, tuple) for code in piece]
