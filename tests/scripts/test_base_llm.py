"""The small base LLM: an ordinary Hugging Face folder that training can extend like Qwen2.5."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM, Qwen2Tokenizer

from vita_audio.chat import extend_tokenizer
from vita_audio.constants import TTS_PROMPT, audio_token

REPOSITORY = Path(__file__).parents[2]
CONFIG = REPOSITORY / "configs" / "quickstart" / "model.json"


@pytest.fixture(scope="module")
def make(maker):
    """Makes a base LLM of a corpus in a folder."""

    def run(corpus: Path, out: Path, config: Path = CONFIG) -> None:
        maker("make_base_llm").main(["--corpus", str(corpus), "--config", str(config), "--out", str(out)])

    return run


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{TTS_PROMPT}\nseven {word}"},
                {"role": "assistant", "content": "<|audio|>"},
            ],
            "audios": [f"{word}.wav"],
        }
        for word in ("eight", "nine", "four") * 20
    ]
    (folder / "tts_train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def base(make, corpus, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    make(corpus, folder)
    return folder


def test_the_auto_classes_load_it(base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    assert isinstance(tokenizer, Qwen2Tokenizer)
    assert isinstance(model, Qwen2ForCausalLM)
    assert model.config.vocab_size % 8 == 0
    assert model.config.vocab_size >= len(tokenizer)
    assert model.config.hidden_size == json.loads(CONFIG.read_text())["hidden_size"]
    logits = model(torch.tensor([tokenizer("seven eight").input_ids])).logits
    assert torch.isfinite(logits).all()


def test_chatml_tokens_are_single_ids_after_the_text_in_the_order_of_qwen2(base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    assert ids == [len(tokenizer) - 3, len(tokenizer) - 2, len(tokenizer) - 1]
    assert tokenizer("<|im_start|>user\n").input_ids[0] == ids[1]
    assert tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.eos_token == "<|im_end|>"


@pytest.mark.parametrize("text", ["seven eight", "  Ünïcode 漢字 ŋ\n\n 3+5=8 ", "it's\tfine"])
def test_any_text_survives_encoding(base, text):
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_words_of_the_corpus_are_single_tokens(base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert len(tokenizer("seven nine").input_ids) == 2
    assert len(tokenizer(TTS_PROMPT).input_ids) <= 6


def test_the_chat_template_writes_chatml(base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    messages = [{"role": "user", "content": "hello"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"


def test_training_extends_it_with_audio_tokens_like_qwen2_5(base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    before = len(tokenizer)
    extend_tokenizer(tokenizer, continuous_input=False, codebook_size=512)
    assert tokenizer.convert_tokens_to_ids(audio_token(0)) == before + 20
    assert len(tokenizer) == before + 20 + 512


def test_the_same_seed_gives_the_same_weights(make, corpus, base, tmp_path):
    make(corpus, tmp_path)
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / name).read_bytes() == (base / name).read_bytes()


def test_wrong_input_is_refused_in_one_line(make, corpus, tmp_path):
    with pytest.raises(ValueError, match=r"^[^\n]*: no \*_train\.jsonl there[^\n]*$"):
        make(tmp_path, tmp_path / "out")
    broken = tmp_path / "model.json"
    broken.write_text('{"hidden_size": 250, "num_attention_heads": 4,')
    with pytest.raises(ValueError, match=r"model\.json: no usable model sizes"):
        make(corpus, tmp_path / "out", broken)
    (tmp_path / "asr_train.jsonl").write_text("{oops\n")
    with pytest.raises(ValueError, match=r"asr_train\.jsonl:1: not JSON"):
        make(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
