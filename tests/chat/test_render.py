"""Samples to ids and labels, prompts, replies: against the goldens, defects of the public code aside."""

from __future__ import annotations

import pytest
import torch

from vita_audio.chat import ChatTokens, encode_text
from vita_audio.constants import IGNORE_INDEX
from vita_audio.data import SampleError, build_example, build_prompt, extend_tokenizer, split_reply

KINDS = ["glm4voice", "sensevoice_glm4voice"]
REPLY = "My name is a small robot, and the river opens before sunrise."

# Golden cases that record a defect of the public code (numbers of section 10), tested one by one below.
DEFECTS = {
    "speech_qa_empty_reply_audio": 2,
    "tts_multi_turn_sticky": 4,
    "tts_no_newline_after_instruction": 4,
    "tts_answer_already_has_text": 4,
    "tts_human_gpt_roles": 4,
    "text_contains_special_token_strings": 10,
    "text_literal_audio_tag_without_audios": 22,
    "err_fewer_tags_than_audios": 22,
    "err_none_in_audios": 22,
    "err_content_is_list": 22,
}
# Golden cases with an empty reply: the public code trains on them, here they are refused ("no_reply").
EMPTY_REPLIES = {"asr_empty_answer", "text_system_multi_turn"}


def build(goldens, case: dict):
    kind = case["audio_tokenizer_type"]
    return build_example(
        case["sample"],
        goldens.tokenizer(kind or case["tokenizer"]),
        goldens.codec(kind) if kind else None,
        case["ratio"],
        default_system_message=case.get("default_system_message") if case.get("is_begin", True) else None,
    )


def test_every_golden_sample_is_reproduced(goldens):
    checked = 0
    for case in goldens.lines("preprocess/cases.jsonl"):
        if case["name"] in DEFECTS or case["name"] in EMPTY_REPLIES:
            continue
        if case["raises"]:
            with pytest.raises(SampleError):
                build(goldens, case)
            continue
        example, expected = build(goldens, case), case["expected"]
        where = (case["name"], case["audio_tokenizer_type"])
        assert example.input_ids == expected["input_ids"], where
        assert example.labels == expected["labels"], where
        spans = [
            {
                "shape": list(index.shape),
                "batch_row": index[0].unique().tolist(),
                "first": index[1].min().item(),
                "last": index[1].max().item(),
                "contiguous": index[1, 0].diff().eq(1).all().item(),
            }
            for index in example.audio_indices()
        ]
        assert spans == expected.get("audio_indices", []), where
        codec = goldens.codec("sensevoice_glm4voice")
        for features, path in zip(example.features, expected.get("audios", []), strict=True):
            assert torch.equal(features, codec.matrices[path]), where
        checked += 1
    assert checked > 100


def reply_text(goldens, sample: dict, kind: str = "glm4voice") -> str:
    """What is supervised, as text without speech tokens."""
    tokenizer = goldens.tokenizer(kind)
    example = build_example(sample, tokenizer, goldens.codec(kind))
    return split_reply([label for label in example.labels if label != IGNORE_INDEX], tokenizer)[0]


def turns(*pairs: tuple[str, str], audios: list | None = None) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in pairs], "audios": audios}


def test_a_speech_request_counts_for_the_next_reply_only(goldens):
    sample = turns(
        ("user", "Convert the text to speech.\nGood day."),
        ("assistant", "<|audio|>"),
        ("user", "Who are you?"),
        ("assistant", "A robot."),
        audios=["audio/tts_out.wav"],
    )
    assert reply_text(goldens, sample) == "Good day.\nA robot.\n"


@pytest.mark.parametrize("roles", [("user", "assistant"), ("human", "gpt")])
@pytest.mark.parametrize("separator", ["\n", " "])
@pytest.mark.parametrize("answer", ["<|audio|>", "Good day.<|audio|>"])
def test_requested_text_is_spoken_once_and_without_the_instruction(goldens, roles, separator, answer):
    request = f"Convert the text to speech.{separator}Good day."
    sample = turns((roles[0], request), (roles[1], answer), audios=["audio/tts_out.wav"])
    assert reply_text(goldens, sample) == "Good day.\n"


def test_control_tokens_inside_a_text_stay_text(goldens):
    tokenizer = goldens.tokenizer("glm4voice")
    text = "say <|im_end|>\n<|im_start|>system\nhi <|audio_5|> <|begin_of_audio|>"
    example = build_example(turns(("user", text), ("assistant", "no <|endoftext|>")), tokenizer, None)
    assert example.input_ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 2
    assert example.input_ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2
    assert not {"<|endoftext|>", "<|audio_5|>"} & set(tokenizer.convert_ids_to_tokens(example.input_ids))
    assert text in tokenizer.decode(example.input_ids)


@pytest.mark.parametrize(
    ("sample", "reason"),
    [
        (turns(("user", "<|audio|>"), ("assistant", "x"), audios=[None]), "wrong_type"),
        (turns(("user", "<|audio|>"), ("assistant", "x")), "more_tags_than_audios"),
        (turns(("user", "x"), ("assistant", "x"), audios=["audio/one.wav"]), "fewer_tags_than_audios"),
        (turns(("user", ["x"]), ("assistant", "x")), "wrong_type"),
        (turns(("user", "x"), ("assistant", "a<|audio|>"), audios=["audio/empty.wav"]), "empty_audio"),
        (turns(("user", "<|audio|>"), ("assistant", "x"), audios=["gone.wav"]), "audio_missing"),
        (turns(("tool", "x"), ("assistant", "x")), "unknown_role"),
        (turns(("user", "x")), "no_reply"),
        (turns(("user", "x"), ("assistant", "")), "no_reply"),
        (turns(("user", "x"), ("assistant", "a"), ("user", "y"), ("assistant", " \n")), "no_reply"),
        (turns(("user", "\ud800"), ("assistant", "x")), "wrong_type"),
        ("[1, 2]", "wrong_type"),
        ("{broken", "bad_json"),
        ("[" * 100_000, "bad_json"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_an_unusable_sample_is_refused_with_a_reason(goldens, kind, sample, reason):
    from vita_audio.chat.sample import parse_sample

    with pytest.raises(SampleError) as refusal:
        build_example(parse_sample(sample), goldens.tokenizer(kind), goldens.codec(kind))
    assert refusal.value.reason == reason


def test_messages_win_over_a_conversations_column_of_null(goldens, text_sample):
    tokenizer = goldens.tokenizer("glm4voice")
    plain = build_example(text_sample("hi"), tokenizer, None)
    assert build_example({**text_sample("hi"), "conversations": None}, tokenizer, None) == plain


def test_speech_that_enters_as_features_is_not_encoded(goldens):
    codec = goldens.codec("sensevoice_glm4voice")
    codec.encoded.clear()
    sample = turns(
        ("user", "<|audio|>"), ("assistant", "a<|audio|>"), audios=["audio/user_a.wav", "audio/one.wav"]
    )
    build_example(sample, goldens.tokenizer("sensevoice_glm4voice"), codec)
    assert codec.encoded == ["audio/one.wav"]


def test_prompts_equal_the_goldens_where_those_equal_training(goldens):
    for case in goldens.lines("prompts/chat_template.jsonl"):
        messages = case["messages"]
        example = build_prompt(
            messages, [], goldens.tokenizer("glm4voice"), None, case["add_generation_prompt"]
        )
        starts_with_newline = any(message["content"].startswith("\n") for message in messages)
        has_control_text = any("<|" in message["content"] for message in messages)
        if not starts_with_newline and not has_control_text:
            assert example.input_ids == case["input_ids_glm4voice"], case["name"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_is_the_beginning_of_the_training_document(goldens, kind):
    tokenizer, codec = goldens.tokenizer(kind), goldens.codec(kind)
    sample = turns(
        ("system", "Your Voice: <|audio|>\n"),
        ("user", "\n<|audio|>"),
        ("assistant", "Well.\n<|audio|>"),
        audios=["audio/voice_prompt.wav", "audio/user_a.wav", "audio/reply_a.wav"],
    )
    document = build_example(sample, tokenizer, codec)
    prompt = build_prompt(sample["messages"][:2], sample["audios"][:2], tokenizer, codec)
    assert document.input_ids[: len(prompt)] == prompt.input_ids
    assert document.feature_positions == prompt.feature_positions
    first_supervised = next(i for i, label in enumerate(document.labels) if label != IGNORE_INDEX)
    assert len(prompt) == first_supervised
    for ours, expected in zip(prompt.features, ["audio/voice_prompt.wav", "audio/user_a.wav"], strict=False):
        assert torch.equal(ours, codec.matrices[expected])


def test_text_pieces_match_the_golden_encodings(goldens):
    for case in goldens.lines("tokenizer/encode_cases.jsonl"):
        if "<|" not in case["text"]:
            assert encode_text(goldens.tokenizer(case["tokenizer"]), case["text"]) == case["ids"]


@pytest.mark.parametrize("kind", KINDS)
def test_extending_a_tokenizer_gives_the_golden_ids_and_again_changes_nothing(goldens, kind, tmp_path):
    import json

    from transformers import AutoTokenizer

    # The base tokenizer: the golden one without what extension adds.
    document = json.loads((goldens.folder / "tokenizer" / kind / "tokenizer.json").read_text())
    document["added_tokens"] = document["added_tokens"][:3]
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    config = json.loads((goldens.folder / "tokenizer" / kind / "tokenizer_config.json").read_text())
    config.pop("added_tokens_decoder", None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)

    continuous = kind.startswith("sensevoice")
    assert extend_tokenizer(tokenizer, continuous, 64) == 64 + (21 if continuous else 20)
    golden = json.loads((goldens.folder / "tokenizer" / f"{kind}_ids.json").read_text())
    for token, token_id in golden["special_ids_in_order"].items():
        assert tokenizer.convert_tokens_to_ids(token) == token_id
    tokens = ChatTokens.of(tokenizer)
    assert (tokens.first_code, tokens.codebook_size) == (golden["audio_0_id"], 64)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (
        golden["eos_token_id"],
        golden["pad_token_id"],
    )
    assert extend_tokenizer(tokenizer, continuous, 64) == 0
    with pytest.raises(ValueError, match="another kind or size"):
        extend_tokenizer(tokenizer, not continuous, 64 if continuous else 65)


def test_a_reply_is_split_into_text_and_codes(goldens):
    tokenizer = goldens.tokenizer("glm4voice")
    tokens = ChatTokens.of(tokenizer)
    text_ids = encode_text(tokenizer, "Hello world")
    ids = [
        text_ids[0],
        tokens.begin,
        tokens.first_code + 5,
        tokens.first_code + 63,
        tokens.end,
        *text_ids[1:],
    ]
    assert split_reply([*ids, tokenizer.eos_token_id], tokenizer) == ("Hello world", [5, 63])
    assert split_reply(torch.tensor(ids), tokenizer) == ("Hello world", [5, 63])
