"""Sorting the ids of a reply into text and codes, as they come and all at once."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from vita_audio.chat import ReplyParser, encode_text, split_reply

TOKENIZER = AutoTokenizer.from_pretrained(
    Path(__file__).parents[1] / "goldens" / "data" / "tokenizer" / "glm4voice"
)
BEGIN, END, FIRST = TOKENIZER.convert_tokens_to_ids(["<|begin_of_audio|>", "<|end_of_audio|>", "<|audio_0|>"])


def pieces_of(ids: list[int]) -> list[str | tuple[int, ...]]:
    parser = ReplyParser(TOKENIZER)
    pieces = [parser.push(token) for token in ids]
    return [piece for piece in (*pieces, *parser.flush()) if piece]


@settings(deadline=None)
@given(st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=60))
def test_the_pieces_of_a_reply_hold_its_text_and_its_codes_in_order(ids):
    codes = [token - FIRST for token in ids if FIRST <= token < FIRST + 64]
    text = TOKENIZER.decode(
        [token for token in ids if not FIRST <= token < FIRST + 64], skip_special_tokens=True
    )
    pieces = pieces_of(ids)
    assert "".join(piece for piece in pieces if isinstance(piece, str)) == text
    assert [code for piece in pieces if isinstance(piece, tuple) for code in piece] == codes
    assert split_reply(ids, TOKENIZER) == (text, codes)


@settings(deadline=None)
@given(st.text(max_size=20))
def test_characters_of_several_bytes_arrive_whole(text):
    ids = encode_text(TOKENIZER, text)
    pieces = pieces_of(ids)
    assert "".join(map(str, pieces)) == TOKENIZER.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces) or "\ufffd" in text


def test_a_chunk_is_complete_with_its_eighth_code_or_its_end_marker():
    codes = [FIRST + code for code in range(10)]
    (text,) = TOKENIZER.encode("a", add_special_tokens=False)
    pieces = pieces_of([BEGIN, *codes[:8], text, END, BEGIN, *codes[8:], END, text])
    assert pieces == [tuple(range(8)), "a", (8, 9), "a"]


def test_padding_rows_of_the_embedding_are_not_text():
    assert split_reply([len(TOKENIZER), FIRST + 3], TOKENIZER) == ("", [3])


@pytest.mark.parametrize("token", [-1, -100, 1 << 31, 1 << 70])
def test_ids_that_no_tokenizer_has_are_refused_in_one_line(token):
    with pytest.raises(ValueError, match=rf"^token id {token} is not valid; [^\n]+$"):
        split_reply([FIRST, token], TOKENIZER)
