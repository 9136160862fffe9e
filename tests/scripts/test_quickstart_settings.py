"""What the quickstart tells its steps and its user: the whole script, with a Python that notes how it is called."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from vita_audio.cli import inference

REPOSITORY = Path(__file__).resolve().parents[2]
QUICKSTART = REPOSITORY / "scripts/quickstart.sh"
MACHINE = {
    *("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR", "OMP_NUM_THREADS", "PYTHON", "PYTHONPATH", "HF_DATASETS_CACHE"),
    *("TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR"),
}  # fmt: skip
"""Read from the shell on purpose, or set by the script itself."""
INTERNAL = {"PREVIOUS_STAGE", "DEFAULT_AUDIO_MODEL"}
"""What a stage script tells launch.sh."""

# Notes its arguments and environment, and makes the folders that it is asked to write to.
NOTING_PYTHON = """#!/bin/sh
calls=$(dirname "$0")/../calls
mkdir -p "$calls"
note=$calls/$(ls "$calls" | wc -l)
{ echo "ARGUMENTS=$*"; env; } >"$note"
while [ $# -gt 0 ]; do
  case $1 in
    --out | --output_dir) mkdir -p "$2" && touch "$2/config.json" "$2/results.md" "$2/asr_test.jsonl" ;;
  esac
  shift
done
"""


@dataclass(frozen=True)
class Run:
    """What a run of the script printed, and the environment of every Python that it started."""

    out: Path
    venv: Path
    printed: str
    calls: list[dict[str, str]]

    def call(self, word: str) -> dict[str, str]:
        return next(call for call in self.calls if word in call["ARGUMENTS"])


def run_quickstart(folder: Path, *arguments: str, **held: str) -> Run:
    venv, out = folder / "venv", folder / "my run"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").write_text(NOTING_PYTHON)
    (venv / "bin" / "python").chmod(0o755)
    run = subprocess.run(
        ["bash", str(QUICKSTART), "--out", str(out), *arguments],
        env={**os.environ, **held, "VENV": str(venv), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    notes = sorted((venv / "calls").iterdir(), key=lambda note: int(note.name))
    calls = [
        dict(line.split("=", 1) for line in note.read_text().splitlines() if "=" in line) for note in notes
    ]
    return Run(out, venv, run.stdout, calls)


def variables_read() -> set[str]:
    """What the scripts that the quickstart calls take from the environment."""
    scripts = [
        REPOSITORY / "scripts/deepspeed/evaluate_sts.sh",
        *(REPOSITORY / "scripts/deepspeed/sts_qwen25").glob("*.sh"),
        REPOSITORY / "scripts/deepspeed/devices.sh",
    ]
    read = {name for file in scripts for name in re.findall(r"\$\{([A-Z][A-Z0-9_]*):?[-+]", file.read_text())}
    return read | {"ASR_JSON", "TTS_JSON", "SQA_JSON"}  # read by a name that is put together


@pytest.fixture(scope="module")
def held() -> dict[str, str]:
    """A shell that holds every variable which a stage or the evaluation reads."""
    return dict.fromkeys(variables_read() - MACHINE - INTERNAL, "from-the-shell")


@pytest.fixture(scope="module", params=["base", "plus"])
def run(request, tmp_path_factory, held) -> Run:
    folder = tmp_path_factory.mktemp(request.param)
    return run_quickstart(folder, "--smoke", "--variant", request.param, **held, SOMETHING="from-the-shell")


def test_variables_of_the_shell_do_not_reach_a_stage_or_the_evaluation(run, held):
    assert len(held) > 40
    for word in (
        "make_spoken_arithmetic",
        "fit_mel_vq",
        "tokenize_audio",
        "inference_sts",
        "evaluate",
        "report",
    ):
        assert run.call(word)
    assert sum("finetune_sts" in call["ARGUMENTS"] for call in run.calls) == 4
    for call in run.calls:
        assert "from-the-shell" not in " ".join(call.values()), call["ARGUMENTS"]


def test_variables_that_the_machine_needs_reach_every_step(tmp_path):
    machine = {"HF_HOME": "/caches/hf", "https_proxy": "http://proxy:1", "TMPDIR": str(tmp_path)}
    run = run_quickstart(tmp_path, "--smoke", **machine)
    for call in run.calls:
        assert {name: call[name] for name in machine} == machine
        assert call["HOME"] == os.environ["HOME"]
        if "/tools/" in call["ARGUMENTS"]:
            assert set(call["PYTHONPATH"].split(":")) == {str(REPOSITORY)}


def test_a_smoke_run_stays_short_in_both_variants(run):
    first, *_ = [call["ARGUMENTS"] for call in run.calls if "finetune_sts" in call["ARGUMENTS"]]
    assert "--max_steps 10 " in first


def test_it_ends_with_commands_to_paste_that_talk_to_the_model(run):
    talk = run.printed[run.printed.index("The model is in") :]
    result = next(run.out.glob("stages/*_mtp10_stage2/quickstart"))
    assert f"source {run.venv}/bin/activate" in talk
    command = re.search(r"^python \S+/tools/(inference_sts\.py .*?)\n\n", talk, re.DOTALL | re.MULTILINE)
    words = shlex.split(command[1].replace("\\\n", " "))
    args = inference.parse(words[1:])
    assert (args.model_name_or_path, args.audio_tokenizer_path) == (str(result), str(run.out / "codec"))
    assert args.question == [str(run.out / "corpus" / "question.wav")]
    program = re.search(r"<<'PY'\n(.*?)\nPY\n", talk, re.DOTALL)[1]
    compile(program, "pasted", "exec")
    assert all((REPOSITORY / page).is_file() for page in re.findall(r"docs/\w+\.md", talk))
    assert args.system_prompt == "auto", "the checkpoint states that it was trained without a system message"
    assert "system=" not in program
    assert f'from_pretrained("{result}"' in program
    if args.audio_tokenizer_type.startswith("sensevoice"):
        assert args.frontend_path == str(run.out / "sensevoice")
        assert 'frontend_path="' in program
