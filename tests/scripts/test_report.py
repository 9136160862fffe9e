"""The report page of a run: what is there is shown, what is missing is left out, nothing is linked."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch

from vita_audio.audio import save_audio

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def report():
    spec = importlib.util.spec_from_file_location("report_tool", REPOSITORY / "tools" / "report.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(tmp_path) -> Path:
    history = [{"step": step, "loss": 5 / step, "main_loss": 4 / step} for step in (5, 10, 15)]
    for entry in history:
        entry |= {f"mtp_loss_{head}": 1.0 for head in range(10)}
    stage = tmp_path / "stages" / "finetune_glm4voice_mtp10_stage1" / "quickstart"
    stage.mkdir(parents=True)
    (stage / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    row = {"stage": "stage3", "asr_wer": 0.0312, "sqa_s2s_accuracy": None, "first_chunk_seconds": 0.0125}
    rows = [
        row | {"mode": mode, "tokens_per_second": 100.0 * k} for k, mode in enumerate(("vanilla", "turbo"), 1)
    ]
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "scores.json").write_text(json.dumps(rows))
    folder = tmp_path / "inference"
    save_audio(folder / "reply.wav", 0.1 * torch.randn(16_000), 16_000)
    reply = {
        "name": "q", "task": "speech QA", "mode": "boost", "streaming": False, "text": "5 < 6 & so",
        "question": [{"role": "user", "content": "<|audio|>"}], "wav": "reply.wav",
        "audios": [str(folder / "reply.wav")],
    }  # fmt: skip
    (folder / "replies.jsonl").write_text(json.dumps(reply) + "\n")
    return tmp_path


def test_the_page_holds_scores_pictures_and_sounds_in_one_file(report, run):
    page = report.write_report(run, run / "report.html", "A run").read_text()
    assert "<td >3.1</td>" in page
    assert "<td >12</td>" in page
    assert page.count("<audio") == 2
    assert page.count("data:image/png;base64,") == 3
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page)
    pictures = {path.name for path in (run / "report").iterdir()}
    assert pictures == {"losses.png", "speed.png", "spectrogram.png"}


def test_words_of_the_model_cannot_break_the_page(report, run):
    page = report.write_report(run, run / "report.html", "A run").read_text()
    assert "5 &lt; 6 &amp; so" in page


def test_columns_without_any_score_are_left_out(report, run):
    page = report.write_report(run, run / "report.html", "A run").read_text()
    assert "ASR WER" in page
    assert "S→S %" not in page


def test_every_head_has_a_line(report, run):
    figure = report.loss_figure(report.read_training_logs(run / "stages"))
    labels = [line.get_label() for line in figure.axes[0].lines]
    assert labels == ["LLM", *(f"head {head}" for head in range(1, 11))]


def test_a_frozen_llm_has_no_line(report):
    frozen = {"2 · one head": [{"step": 5, "loss": 2.0, "mtp_loss_0": 2.0}]}
    assert [line.get_label() for line in report.loss_figure(frozen).axes[0].lines] == ["head 1"]


def test_an_empty_run_and_a_torn_file_are_refused(report, run, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(ValueError, match="nothing to report"):
        report.write_report(empty, empty / "report.html", "A run")
    (run / "evaluation" / "scores.json").write_text("[{")
    with pytest.raises(ValueError, match=r"scores\.json: not JSON"):
        report.write_report(run, run / "report.html", "A run")
