"""The inspection page shows what training will see."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from vita_audio.audio.mel_vq import MelVQConfig, MelVQTokenizer

TOOL = Path(__file__).parents[2] / "tools" / "inspect_data.py"


@pytest.fixture(scope="module")
def page(tmp_path_factory, write_lines, text_sample, goldens, arrow_cache) -> str:
    specification = importlib.util.spec_from_file_location("inspect_data", TOOL)
    tool = importlib.util.module_from_spec(specification)
    sys.modules["inspect_data"] = tool  # dataclasses look their module up
    specification.loader.exec_module(tool)

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
        tool.main(
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
