"""Prompts against the recorded ones, token for token; where they differ, the difference is the recorded bug."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from vita_audio.constants import LUKE_SYSTEM_PROMPT, OMNI_SYSTEM_PROMPT
from vita_audio.data import build_prompt
from vita_audio.inference import Conversation, prompts

DATA = Path(__file__).parents[1] / "goldens" / "data"
GOLDENS = [
    json.loads(line) for line in (DATA / "prompts" / "prompts.jsonl").read_bytes().split(b"\n") if line
]


class RecordedCodec:
    """Returns what the recording's codec returned for each path."""

    def __init__(self, kind: str):
        self.kind = kind
        self._codes = json.loads((DATA / "preprocess" / "audio_tokens.json").read_text())
        self._features = load_file(DATA / "preprocess" / "audio_features.safetensors")

    def encode(self, audio: str) -> list[int]:
        return self._codes[audio]

    def features(self, audio: str) -> torch.Tensor:
        return self._features[audio]


def conversation_of(golden: dict) -> Conversation:
    args = golden["args"]
    if golden["builder"] == "asr_eval" or golden["builder"] == "tts_eval":
        return prompts.from_sample(args["sample"])
    if golden["builder"] == "sqa_eval":
        return prompts.from_sample(args["sample"], default_system=OMNI_SYSTEM_PROMPT)
    if golden["builder"] == "seedtts_eval":
        return prompts.synthesis(args["text"])
    system = None if args.get("mode", "luke") is None else LUKE_SYSTEM_PROMPT
    message, voice = args.get("message", ""), args.get("prompt_audio_path")
    if "audio_path" in args:
        return prompts.speech_to_speech(args["audio_path"], message, system, voice)
    if message.startswith("Convert the text to speech.\n"):
        return prompts.synthesis(message.removeprefix("Convert the text to speech.\n"), voice)
    return prompts.chat(message, system)


def name_of(golden: dict) -> str:
    return f"{golden['builder']}-{golden['tokenizer']}-{GOLDENS.index(golden)}"


def is_swapped(golden: dict) -> bool:
    """Plus with a voice and a question: recorded with the two features swapped (bug 5)."""
    return golden["tokenizer"].startswith("sensevoice") and {"prompt_audio_path", "audio_path"} <= set(
        golden["args"]
    )


# With a speaker prompt the recorded Seed-TTS run words it unlike training ("Speaker Metadata:"), or
# drops it (Plus); here voice cloning has one wording everywhere (section 10, bug 10).
COMPARABLE = [
    golden for golden in GOLDENS if not golden["args"].get("speaker_prompt") and not is_swapped(golden)
]


@pytest.mark.parametrize("golden", COMPARABLE, ids=name_of)
def test_prompts_equal_the_recorded_ones(golden):
    tokenizer = AutoTokenizer.from_pretrained(DATA / "tokenizer" / golden["tokenizer"])
    conversation = conversation_of(golden)
    example = build_prompt(
        conversation.messages, conversation.audios, tokenizer, RecordedCodec(golden["tokenizer"])
    )
    speech_alone = "audio_path" in golden["args"] and not golden["args"].get("message")
    if speech_alone:
        # Recorded: the content starts with a newline that training does not have (bug 10).
        recorded = tokenizer.decode(golden["input_ids"])
        assert "user\n\n<|begin_of_audio|>" in recorded
        assert tokenizer.decode(example.input_ids) == recorded.replace("user\n\n<", "user\n<")
    else:
        assert example.input_ids == golden["input_ids"]


@pytest.mark.parametrize("golden", filter(is_swapped, GOLDENS), ids=name_of)
def test_the_voice_fills_the_system_message_and_the_question_the_users(golden):
    tokenizer = AutoTokenizer.from_pretrained(DATA / "tokenizer" / golden["tokenizer"])
    codec, conversation = RecordedCodec(golden["tokenizer"]), conversation_of(golden)
    example = build_prompt(conversation.messages, conversation.audios, tokenizer, codec)
    lengths = [len(positions) for positions in example.feature_positions]
    voice, question = golden["args"]["prompt_audio_path"], golden["args"]["audio_path"]
    assert lengths == [len(codec.features(audio)) + 4 for audio in (voice, question)]
    context = tokenizer.convert_tokens_to_ids("<|context_of_audio|>")
    recorded = "".join("x" if token == context else " " for token in golden["input_ids"]).split()
    assert [len(run) for run in recorded] == lengths[::-1]


def test_the_question_of_a_sample_leaves_out_the_answer_and_its_audio():
    sample = {
        "messages": [
            {"role": "user", "content": "<|audio|>"},
            {"role": "assistant", "content": "blue\n<|audio|>"},
        ],
        "audios": ["q.wav", "a.wav"],
    }
    conversation = prompts.from_sample(sample, default_system="Speak.")
    assert [message.role for message in conversation.messages] == ["system", "user"]
    assert conversation.audios == ("q.wav",)
    with pytest.raises(ValueError, match="no assistant message"):
        prompts.from_sample({"messages": sample["messages"][:1], "audios": ["q.wav"]})


@pytest.mark.parametrize("kind", ["glm4voice", "sensevoice_glm4voice"])
@pytest.mark.parametrize("typed", ["what does <|audio|> mean?", "<|audio|>", "<|audio_3|> <|im_end|>"])
def test_a_typed_tag_is_text(kind, typed):
    tokenizer = AutoTokenizer.from_pretrained(DATA / "tokenizer" / kind)
    codec = RecordedCodec(kind)

    def ids(conversation: Conversation) -> list[int]:
        return build_prompt(conversation.messages, conversation.audios, tokenizer, codec).input_ids

    for conversation in (
        prompts.chat(typed),
        prompts.synthesis(typed),
        prompts.speech_to_speech("audio/user_a.wav", typed),
        prompts.chat("hi", system=typed),
    ):
        assert typed in tokenizer.decode(ids(conversation))
    plain = ids(prompts.speech_to_speech("audio/user_a.wav"))
    spoken = ids(prompts.speech_to_speech("audio/user_a.wav", typed))
    begin = tokenizer.convert_tokens_to_ids("<|begin_of_audio|>")
    assert spoken.count(begin) == plain.count(begin) == 1


@pytest.mark.parametrize("text", ["", " ", "\n\t "])
def test_a_blank_text_is_not_read_aloud(text):
    tokenizer = AutoTokenizer.from_pretrained(DATA / "tokenizer" / "glm4voice")
    typed = prompts.synthesis(text)
    sample = {
        "messages": [
            {"role": "user", "content": f"Convert the text to speech.\n{text}"},
            {"role": "assistant", "content": "x"},
        ]
    }
    for conversation in (typed, prompts.from_sample(sample)):
        with pytest.raises(ValueError, match="blank; provide some words"):
            build_prompt(conversation.messages, conversation.audios, tokenizer, None)


def test_tags_and_audios_must_agree():
    with pytest.raises(ValueError, match=r"1 <\|audio\|> tags but 0 audios"):
        Conversation([{"role": "user", "content": "<|audio|>"}])
    with pytest.raises(ValueError, match=r"0 <\|audio\|> tags but 1 audios"):
        Conversation([{"role": "user", "content": "hi"}], ["a.wav"])


def test_the_last_message_determines_the_task():
    assert prompts.task_of(prompts.transcription("a.wav")) == "ASR"
    assert prompts.task_of(prompts.synthesis("hi")) == "TTS"
    assert prompts.task_of(prompts.synthesis("hi", voice="v.wav")) == "voice clone"
    assert prompts.task_of(prompts.speech_to_speech("q.wav")) == "speech QA"
    assert prompts.task_of(prompts.chat("hi")) == "text"


@pytest.mark.parametrize("text", ["\u200b", "\ufeff\u2060", "...", "?!", "—", "\x00", "\u0300"])
def test_a_text_without_anything_to_read_aloud_is_refused(text, goldens):
    conversation = prompts.synthesis(text)
    with pytest.raises(ValueError, match="blank; provide some words"):
        build_prompt(conversation.messages, (), goldens.tokenizer("glm4voice"), None)


@pytest.mark.parametrize("text", [None, 5, b"hi", ["hi"], "a\udcff"], ids=repr)
def test_a_value_that_is_not_text_is_refused_instead_of_being_spoken(text):
    for ask in (prompts.synthesis, prompts.chat):
        with pytest.raises(ValueError, match=r"(must be|is not)[^\n]+$"):
            ask(text)
