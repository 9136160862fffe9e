"""The report page of a run: existing parts are shown, missing ones are omitted, and nothing is linked."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from vita_audio.audio import save_audio
from vita_audio.cli import report


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
    (tmp_path / "evaluation" / "results.json").write_text(json.dumps(rows))
    folder = tmp_path / "inference"
    save_audio(folder / "reply.wav", 0.1 * torch.randn(16_000), 16_000)
    reply = {
        "name": "q", "task": "speech QA", "mode": "boost", "streaming": False, "text": "5 < 6 & so",
        "question": [{"role": "user", "content": "<|audio|>"}], "wav": "reply.wav",
        "audios": [str(folder / "reply.wav")],
    }  # fmt: skip
    (folder / "replies.jsonl").write_text(json.dumps(reply) + "\n")
    return tmp_path


def test_the_page_holds_scores_pictures_and_sounds_in_one_file(run):
    page = report.write_report(run, run / "report.html", "A run").read_text()
    assert "<td >3.1</td>" in page
    assert "<td >12</td>" in page
    assert page.count("<audio") == 2
    assert page.count("data:image/png;base64,") == 3
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page)
    pictures = {path.name for path in (run / "report").iterdir()}
    assert pictures == {"losses.png", "speed.png", "spectrogram.png"}


def test_scores_show_their_intervals(run):
    path = run / "evaluation" / "results.json"
    rows = json.loads(path.read_text())
    rows[0]["sets"] = {"digits": {"task": "asr", "items": 9, "intervals": {"asr_wer": [0.021, 0.044]}}}
    path.write_text(json.dumps(rows))
    page = report.write_report(run, run / "report.html", "A run").read_text()
    assert '<td >3.1<br><small class="soft">2.1 – 4.4</small></td>' in page


def test_the_figures_of_an_analysis_are_shown(run):
    folder = run / "analysis"
    folder.mkdir()
    (folder / "analysis.json").write_text("{}")
    for name in ("attention", "heads"):
        (folder / f"{name}.png").write_bytes(b"picture")
    page = report.write_report(run, run / "report.html", "A run").read_text()
    assert page.count('alt="Analysis: ') == 2
    assert page.count("data:image/png;base64,") == 5


def test_words_of_the_model_cannot_break_the_page(run):
    page = report.write_report(run, run / "report.html", "A run").read_text()
    assert "5 &lt; 6 &amp; so" in page


def test_columns_without_any_score_are_left_out(run):
    page = report.write_report(run, run / "report.html", "A run").read_text()
    assert "ASR WER" in page
    assert "S→S %" not in page


def test_every_head_has_a_line(run):
    figure = report.loss_figure(report.read_training_logs(run))
    labels = [line.get_label() for line in figure.axes[0].lines]
    assert labels == ["LLM", *(f"head {head}" for head in range(1, 11))]


def test_a_frozen_llm_has_no_line():
    frozen = {"2 · one head": [{"step": 5, "loss": 2.0, "mtp_loss_0": 2.0}]}
    assert [line.get_label() for line in report.loss_figure(frozen).axes[0].lines] == ["head 1"]


def test_an_empty_run_and_a_torn_file_are_refused(run, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(ValueError, match="nothing to report"):
        report.write_report(empty, empty / "report.html", "A run")
    (run / "evaluation" / "results.json").write_text("[{")
    with pytest.raises(ValueError, match=r"results\.json: not valid JSON"):
        report.write_report(run, run / "report.html", "A run")


def test_the_folder_of_one_stage_is_a_run(run, tmp_path_factory):
    stage = run / "stages" / "finetune_glm4voice_mtp10_stage1" / "quickstart"
    assert list(report.read_training_logs(stage)) == ["3 · ten heads"]
    page = report.write_report(stage, tmp_path_factory.mktemp("out") / "report.html", "One stage").read_text()
    assert page.count("data:image/png;base64,") == 1


def test_folders_named_as_the_original_names_them_are_stages(tmp_path):
    for name in ("finetune_sensevoice_glm4voice_mtp1_stage1.sh", "finetune_glm4voice_stage1.sh"):
        folder = tmp_path / "LM/scripts/deepspeed/sts_qwen25" / name / "20250505_10"
        folder.mkdir(parents=True)
        history = {"log_history": [{"step": 1, "loss": 2.0, "main_loss": 2.0}]}
        (folder / "trainer_state.json").write_text(json.dumps(history))
    assert list(report.read_training_logs(tmp_path)) == ["1 · alignment", "2 · one head"]


def test_another_run_is_titled_by_its_folder_and_shown_while_it_trains(tmp_path):
    checkpoint = tmp_path / "my_voice" / "checkpoint-20"
    checkpoint.mkdir(parents=True)
    history = {"log_history": [{"step": 20, "loss": 2.0, "main_loss": 2.0}]}
    (checkpoint / "trainer_state.json").write_text(json.dumps(history))
    for run in (tmp_path, tmp_path / "my_voice", checkpoint):
        assert list(report.read_training_logs(run)) == ["my_voice"]


def test_the_folders_of_an_evaluation_and_of_an_inference_are_runs(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    scores = report.write_report(run / "evaluation", out / "scores.html", "Scores").read_text()
    assert "<td >3.1</td>" in scores
    replies = report.write_report(run / "inference", out / "replies.html", "Replies").read_text()
    assert replies.count("<audio") == 2


def test_the_command_prints_the_path_of_the_page_and_refuses_other_folders(run, refusal, capsys):
    report.main(["--run", str(run)])
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert refusal(report.main, "--run", run / "nowhere").endswith(
        "no such folder; give the output folder of the run"
    )
