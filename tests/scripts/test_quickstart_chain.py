"""The whole chain in small, killed in the middle of stage 3 and started again."""

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from quickstart_chain import CHAIN_SECONDS, start_chain

pytestmark = pytest.mark.slow

STEPS_BEFORE_STAGE_3 = ("corpus", "codec", "base_llm", "audio_tokens", "stage1", "mtp1_stage1")


def kill_all(process: subprocess.Popen) -> None:
    """SIGKILL to a process and everything it has started, at once."""
    root = psutil.Process(process.pid)
    for one in [root, *root.children(recursive=True)]:
        one.kill()
    process.wait()


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, list[str]]:
    """The run's folder, and what the second start said."""
    out = tmp_path_factory.mktemp("quickstart") / "run"
    first = start_chain(out)
    stage3 = out / "stages/finetune_glm4voice_mtp10_stage1/quickstart"
    give_up = time.monotonic() + CHAIN_SECONDS
    while not list(stage3.glob("checkpoint-*/checkpoint.complete")):
        assert first.poll() is None, (out.parent / "output.txt").read_text()[-3000:]
        assert time.monotonic() < give_up
        time.sleep(0.02)
    kill_all(first)
    assert not (stage3 / "stage.complete").exists(), "killed too late to tell anything"
    second = start_chain(out)
    assert second.wait(CHAIN_SECONDS) == 0, (out.parent / "output.txt").read_text()[-3000:]
    log = (out.parent / "output.txt").read_text()
    return out, log[log.index("[corpus] done before") :].splitlines()


def test_the_second_start_continues_stage_3_from_its_last_checkpoint(finished):
    out, said = finished
    for name in STEPS_BEFORE_STAGE_3:
        assert any(line.startswith(f"[{name}] done before, in ") for line in said), name
    stage3 = out / "stages/finetune_glm4voice_mtp10_stage1/quickstart"
    assert any(f"continuing from {stage3}/checkpoint-" in line for line in said)
    history = json.loads((stage3 / "trainer_state.json").read_text())["log_history"]
    steps = [line["step"] for line in history if "loss" in line]
    assert steps == list(range(1, len(steps) + 1))


def test_the_table_has_every_stage_and_mode(finished):
    out, _ = finished
    rows = json.loads((out / "evaluation/results.json").read_text())
    keys = [(row["stage"], row["mode"]) for row in rows]
    modes = ["vanilla", "balance", "boost", "turbo"]
    assert [key for key in keys if key[0] in ("stage3", "stage4")] == [
        (stage, mode) for stage in ("stage3", "stage4") for mode in modes
    ]
    assert {key[0] for key in keys} == {"stage1", "stage2", "stage3", "stage4"}
    scores = {"asr_wer", "tts_wer", "sqa_s2t_accuracy", "sqa_s2s_accuracy"}
    for row in rows:
        assert {name for name in scores if row.get(name) is None} == set(), "a column is empty"
        assert row["tokens_per_second"] > 0
        assert 0 <= row["tts_floor_wer"] < 0.5


def test_the_report_has_its_pictures_and_players(finished):
    out, _ = finished
    assert {path.name for path in (out / "report").glob("*.png")} >= {"losses.png", "speed.png"}
    analysis = json.loads((out / "analysis/analysis.json").read_text())
    assert list(analysis["hiding"]) == ["all", "matching", "none"]
    assert len(analysis["heads"]["accuracy"]) == 11
    assert (out / "report.html").read_text().count('alt="Analysis: ') >= 2
    replies = [json.loads(line) for line in (out / "inference/replies.jsonl").read_text().splitlines()]
    questions = {reply["name"]: len(reply["audios"]) for reply in replies}
    assert sum(questions.values()) >= 3, "ASR, speech QA and voice clone are asked with a recording"
    answers = sum(reply["wav"] is not None for reply in replies)
    assert (out / "report.html").read_text().count("<audio") == sum(questions.values()) + answers


def test_the_result_loads_by_its_type_alone_and_generates_with_its_heads(finished):
    out, _ = finished
    result = out / "stages/finetune_glm4voice_mtp10_stage2/quickstart"
    program = f"""
import vita_audio
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({str(result)!r})
tokenizer = AutoTokenizer.from_pretrained({str(result)!r})
messages = [{{"role": "user", "content": "add one and two"}}]
prompt = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
output = model.generate(**prompt, max_new_tokens=23, min_new_tokens=23)
print(model.generation_config.mtp_inference_mode, output.shape[1] - prompt["input_ids"].shape[1])
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.stdout.splitlines() == ["[1, 10, 4, 10] 23"], run.stderr[-2000:]


def test_a_third_start_changes_nothing(finished):
    out, _ = finished
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert start_chain(out).wait(CHAIN_SECONDS) == 0
    after = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    changed = {path.name for path in after if before.get(path) != after[path]}
    assert changed <= {".lock", ".kind"}
