"""The inspection page shows what training will see."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from vita_audio.audio.mel_vq import MelVQConfig, MelVQTokenizer
from vita_audio.cli.inspect_data import main


@pytest.fixture(scope="module")
def page(tmp_path_factory, write_lines, text_sample, goldens, arrow_cache) -> str:
    folder = tmp_path_factory.mktemp("inspect")
    noise = np.random.default_rng(0).standard_normal(36_000) * 0.1
    soundfile.write(folder / "clip.wav", noise, 16_000)
    MelVQTokenizer.fit(
        [(torch.from_numpy(noise).float(), 16_000)], MelVQConfig(codebook_size=8), epochs=1
    ).save_pretrained(folder / "codec")
    spoken = {
        "messages": [
            {"role": "user", "content": "Convert the text to speech.\nGood <day>"},
            {"role": "assistant", "content": "<|audio|>"},
        ],
        "audios": ["clip.wav"],
    }
    write_lines(folder / "tts.jsonl", [spoken] * 40)
    write_lines(folder / "text.jsonl", [text_sample("hello " * 5)] * 19 + ["{broken"])
    mix = write_lines(
        folder / "mix.yaml",
        [
            "dataset: {speech: {ratio: 2, data_paths: [tts.jsonl]}, words: {data_paths: [text.jsonl, lost.jsonl]}}"
        ],
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", Path(arrow_cache))
        main(
            [
                str(mix),
                *("--tokenizer", str(goldens.folder / "tokenizer" / "glm4voice")),
                *("--audio_tokenizer_type", "mel_vq", "--audio_tokenizer_path", str(folder / "codec")),
                *("--model_max_length", "256", "--out", str(folder / "out" / "page.html")),
            ]
        )
    return (folder / "out" / "page.html").read_text(encoding="utf-8")


def test_sources_counts_hours_and_refusals_are_shown(page):
    cells = re.search(r"<td>speech/tts</td><td>([\d,]+)</td><td>([\d,]+)</td><td>([\d.]+)</td>", page)
    assert cells.groups() == ("40", "80", f"{80 * 2.25 / 3600:.2f}")
    assert "bad_json 1" in page
    assert "{broken" in page
    assert "lost.jsonl: no such file" in page


def test_fill_players_and_supervised_spans_are_shown(page):
    assert re.search(r"\d+ rows of 256 tokens, <b>9\d\.\d\d%</b> full", page)
    assert "src='data:audio/x-wav;base64,UklGR" in page or "src='data:audio/wav;base64,UklGR" in page
    assert re.search(r"<span class='code learnt'> ♪[\d ]+</span>", page)
    assert "Good &lt;day&gt;" in page, "text of strangers must not become markup"
    question = re.search(r"<span class='text'>[^<]*Convert the text to speech", page)
    assert question, "the request is not supervised"


def test_texts_are_shown_without_codec_and_with_the_tokenizer_of_a_base_model(
    tmp_path, write_lines, text_sample, arrow_cache, monkeypatch
):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", Path(arrow_cache))
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "tools" / "quickstart")
    maker = importlib.import_module("make_base_llm")
    maker.train_tokenizer(iter(["hello world"] * 10), 300).save_pretrained(tmp_path / "base")
    spoken = text_sample("<|audio|>") | {"audios": ["a.wav"]}
    for part in ("one", "two"):  # two files of one name are one source
        write_lines(tmp_path / part / "train.jsonl", [text_sample("hello world"), spoken])
    mix = write_lines(
        tmp_path / "mix.yaml", ["dataset: {words: {data_paths: [one/train.jsonl, two/train.jsonl]}}"]
    )
    main([str(mix), "--tokenizer", str(tmp_path / "base"), "--out", str(tmp_path / "page.html")])
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<td>words/train</td><td>4</td><td>4</td>" in page
    assert "no_codec 2" in page
    assert "hello world" in page
    assert "internal" not in page


def test_a_missing_tokenizer_or_mix_is_refused_in_one_line(tmp_path, goldens):
    with pytest.raises(ValueError, match=r"^nowhere: no such folder[^\n]*$"):
        main([str(tmp_path / "mix.yaml"), "--tokenizer", "nowhere"])
    tokenizer = goldens.folder / "tokenizer" / "glm4voice"
    with pytest.raises(ValueError, match=r"^[^\n]*mix\.yaml[^\n]*$"):
        main([str(tmp_path / "mix.yaml"), "--tokenizer", str(tokenizer)])
