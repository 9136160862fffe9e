"""One sample: every kind of content ends as a conversation or as a reason."""

from __future__ import annotations

import json

import pytest

from vita_audio.chat import ChatTokens, SampleError, build_example, parse_sample

USER = {"role": "user", "content": "hey"}
FORMATS = {
    "messages": lambda user, reply: {
        "messages": [{"role": "user", "content": user}, {"role": "assistant", "content": reply}]
    },
    "conversations": lambda user, reply: {
        "conversations": [{"role": "user", "content": user}, {"role": "assistant", "content": reply}]
    },
    "from and value": lambda user, reply: {
        "conversations": [{"from": "human", "value": user}, {"from": "gpt", "value": reply}]
    },
    "null columns": lambda user, reply: {
        "conversations": None,
        "messages": [
            {"role": "user", "content": user, "from": None, "value": None},
            {"role": "assistant", "content": reply, "from": None, "value": None},
        ],
    },
}
every_format = pytest.mark.parametrize("make", FORMATS.values(), ids=FORMATS)


def reason(sample: object, **options) -> str:
    line = json.dumps(sample)
    with pytest.raises(SampleError) as refused:
        parse_sample(line, **options)
    assert str(refused.value).count("\n") == 0
    return refused.value.reason


@every_format
@pytest.mark.parametrize("empty", ["", "  \n\t"])
def test_empty_replies_are_refused_in_every_format(make, empty):
    assert parse_sample(make("hey", "ho")).messages[1].content == "ho"
    assert reason(make("hey", empty)) == "no_reply"
    assert parse_sample(make("hey", empty), need_reply=False).messages[1].content == empty


@every_format
def test_a_reply_of_speech_alone_is_a_reply(make):
    sample = make("hey", "<|audio|>") | {"audios": ["a.wav"]}
    assert parse_sample(sample).audios == ("a.wav",)


def test_one_empty_reply_among_several_is_refused():
    turns = [USER, {"role": "assistant", "content": ""}, USER, {"role": "assistant", "content": "ho"}]
    assert reason({"messages": turns}) == "no_reply"


@every_format
@pytest.mark.parametrize("content", [None, ["ho"], [], {"text": "ho"}, {}, 5, True, 0, 1.5, [None]])
def test_content_that_is_not_text_ends_as_a_reason(make, content):
    assert reason(make("hey", content)) == "wrong_type"
    assert reason(make(content, "ho")) == "wrong_type"


@every_format
def test_a_list_of_answers_is_read_where_test_sets_have_it(make):
    sample = parse_sample(make("hey", ["ho", "hi"]), answer_lists=True)
    assert (sample.messages[1].content, sample.answers) == ("ho", ("ho", "hi"))
    assert reason(make("hey", []), answer_lists=True) == "no_reply"
    for wrong in ([None], ["ho", 5], {"a": "ho"}, None):
        assert reason(make("hey", wrong), answer_lists=True) == "wrong_type"
    assert reason(make(["hey"], "ho"), answer_lists=True) == "wrong_type"


@pytest.mark.parametrize("nothing", [None, [], ""])
def test_a_key_without_a_value_counts_as_missing(nothing):
    turns = FORMATS["messages"]("hey", "ho")["messages"]
    sample = parse_sample(
        {"messages": turns, "conversations": nothing, "audios": nothing, "id": nothing or None}
    )
    assert (sample.messages[1].content, sample.audios, sample.id, sample.answers) == ("ho", (), None, ())
    assert reason({"messages": nothing}) == "no_messages"
    assert parse_sample({"messages": turns, "answers": nothing or []}).answers == ()
    mixed = [{"role": "", "from": "human", "content": "", "value": "hey"}, turns[1]]
    assert parse_sample({"messages": mixed}).messages[0].content == "hey"


class FixedCodec:
    """Gives the same codes for each clip."""

    kind = "glm4voice"

    def __init__(self, codes: list) -> None:
        self.codes = codes

    def encode(self, audio: str) -> list:
        return self.codes


def test_codes_outside_the_codebook_are_bad_codes_and_those_inside_are_used(goldens):
    tokenizer = goldens.tokenizer("glm4voice")
    tokens = ChatTokens.of(tokenizer)
    sample = FORMATS["messages"]("hey", "<|audio|>") | {"audios": ["a.wav"]}
    size = tokens.codebook_size
    example = build_example(sample, tokenizer, FixedCodec([0, size - 1]))
    assert {tokens.first_code, tokens.first_code + size - 1} <= set(example.input_ids)
    for codes in ([size], [0, size + 7], [-1], [1.0], ["1"], [None]):
        with pytest.raises(
            SampleError, match=rf"a\.wav: codes must be whole numbers in \[0, {size}\)"
        ) as refused:
            build_example(sample, tokenizer, FixedCodec(codes))
        assert refused.value.reason == "bad_codes"
