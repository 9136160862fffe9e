"""Sorting a stream of ids into text and codes."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from vita_audio.data import split_reply
from vita_audio.inference import resolve_mode
from vita_audio.inference.engine import cut_at_stop
from vita_audio.inference.prompts import from_sample
from vita_audio.inference.streaming import ReplySplitter

TOKENIZER = AutoTokenizer.from_pretrained(
    Path(__file__).parents[1] / "goldens" / "data" / "tokenizer" / "glm4voice"
)
BEGIN, END, FIRST = TOKENIZER.convert_tokens_to_ids(["<|begin_of_audio|>", "<|end_of_audio|>", "<|audio_0|>"])


def split(ids: list[int]) -> tuple[str, list[int], list[object]]:
    splitter = ReplySplitter(TOKENIZER, codebook_size=64)
    pieces = [piece for token in ids if (piece := splitter.push(token)) is not None]
    text, codes = splitter.flush()
    pieces += [piece for piece in (text, codes) if piece]
    return (
        "".join(piece for piece in pieces if isinstance(piece, str)),
        [code for piece in pieces if isinstance(piece, tuple) for code in piece],
        pieces,
    )


@settings(deadline=None)
@given(st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=60))
def test_streamed_text_and_codes_equal_those_of_the_whole_reply(ids):
    text, codes, _ = split(ids)
    assert (text, codes) == split_reply(ids, TOKENIZER)


@settings(deadline=None)
@given(st.text(max_size=20))
def test_characters_of_several_bytes_arrive_whole(text):
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    streamed, _, pieces = split(ids)
    assert streamed == TOKENIZER.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces) or "\ufffd" in text


def test_a_chunk_is_complete_with_its_eighth_code_or_its_end_marker():
    codes = [FIRST + code for code in range(10)]
    (text,) = TOKENIZER.encode("a", add_special_tokens=False)
    _, _, pieces = split([BEGIN, *codes[:8], text, END, BEGIN, *codes[8:], END, text])
    assert pieces == [tuple(range(8)), "a", (8, 9), "a"]


def test_padding_rows_of_the_embedding_are_no_text():
    assert split([len(TOKENIZER), FIRST + 3])[:2] == ("", [3])


@pytest.mark.parametrize(
    ("mode", "schedule"),
    [
        ("Boost", [1, 10, 4, 10]),
        ("1 10", [1, 10]),
        ("[8192, 0]", [8192, 0]),
        ("1-4-3-8", [1, 4, 3, 8]),
        ((2, 3), [2, 3]),
    ],
)
def test_modes_come_by_name_text_or_numbers(mode, schedule):
    assert resolve_mode(mode) == schedule


@pytest.mark.parametrize("mode", ["fast", "1", "0 10", [1, 2, 3], ""])
def test_impossible_modes_are_refused(mode):
    with pytest.raises(ValueError, match="mtp_inference_mode"):
        resolve_mode(mode)


def test_a_reply_ends_before_its_first_stop_token():
    assert cut_at_stop([4, 5, 9, 5, 9], [9]) == [4, 5]
    assert cut_at_stop([4], [9]) == [4]


def test_the_question_of_a_sample_leaves_out_the_answer_and_its_audio():
    sample = {
        "messages": [
            {"role": "user", "content": "<|audio|>"},
            {"role": "assistant", "content": "blue\n<|audio|>"},
        ],
        "audios": ["q.wav", "a.wav"],
    }
    conversation = from_sample(sample, default_system="Speak.")
    assert [message["role"] for message in conversation.messages] == ["system", "user"]
    assert conversation.audios == ["q.wav"]
    with pytest.raises(ValueError, match="no assistant message"):
        from_sample({"messages": sample["messages"][:1], "audios": ["q.wav"]})
