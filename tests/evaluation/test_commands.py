"""The command lines, run as a user runs them, on a tiny model."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
GRAMMAR = "#JSGF V1.0;\ngrammar words;\npublic <words> = ( river | blue | quiet )+;\n"


@pytest.fixture
def run_tool(monkeypatch):
    """Runs ``tools/NAME.py ARGUMENTS`` in this process."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "tools"))

    def run(name: str, *arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(REPOSITORY / "tools" / f"{name}.py"), run_name="__main__")

    return run


@pytest.fixture
def codec_flags(tiny_world):
    return [
        "--audio_tokenizer_type",
        "mel_vq",
        "--audio_tokenizer_path",
        tiny_world.codec_dir,
        "--device",
        "cpu",
    ]


@pytest.fixture
def table_flags(tiny_world, codec_flags, tmp_path):
    grammar = tmp_path / "words.gram"
    grammar.write_text(GRAMMAR)
    sets = [
        word
        for task in ("asr", "tts", "sqa")
        for word in (f"--{task}", tiny_world.data_dir / f"{task}.jsonl")
    ]
    return [
        "--checkpoints", f"tiny={tiny_world.model_dir}@vanilla,1-10", *codec_flags, *sets, "--grammar", grammar,
        "--transcriber_processes", 0, "--speed_items", 1, "--system_prompt", "none", "--output_dir", tmp_path / "out",
    ]  # fmt: skip


def test_the_table_is_written_and_continued(run_tool, table_flags, tmp_path, monkeypatch):
    run_tool("evaluate_table", *table_flags)
    rows = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert [(row["stage"], row["mode"]) for row in rows] == [("tiny", "vanilla"), ("tiny", "1 10")]
    for row in rows:
        assert (row["asr_wer"], row["sqa_s2t_accuracy"]) == (0.0, 1.0)
        assert row["tts_wer"] == row["tts_floor_wer"]
        assert row["tokens_per_second"] > 0
        assert row["first_chunk_seconds"] > 0
    assert "| tiny | 1 10 |" in (tmp_path / "out" / "scores.md").read_text()
    assert (tmp_path / "out" / "tiny-1-10" / "wav" / "tts" / "tts_1.wav").is_file()

    def refuse(*_, **__):
        raise AssertionError("a finished row was computed again")

    monkeypatch.setattr("vita_audio.evaluation.table.score_row", refuse)
    run_tool("evaluate_table", *table_flags)
    assert json.loads((tmp_path / "out" / "scores.json").read_text()) == rows


def test_ids_of_several_test_sets_stay_apart(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(REPOSITORY / "tools"))
    tool = runpy.run_path(str(REPOSITORY / "tools" / "evaluate_table.py"))
    args = Namespace(data_root=None, limit=None)
    paths = [tmp_path / name for name in ("first.jsonl", "second.jsonl")]
    for path in paths:
        messages = [{"role": "user", "content": path.stem}, {"role": "assistant", "content": "a"}]
        path.write_text(json.dumps({"messages": messages}) + "\n")  # no id: the line's number is its name
    items = tool["read_sets"](paths, args)
    assert [(item.id, item.conversation.messages[0]["content"]) for item in items] == [
        ("first_1", "first"),
        ("second_1", "second"),
    ]
    assert [item.id for item in tool["read_sets"](paths[:1], args)] == ["1"]
    with pytest.raises(ValueError, match="'first_1' occurs twice"):
        tool["read_sets"]([paths[0], paths[0]], args)


@pytest.mark.parametrize("task", ["asr", "tts", "sqa"])
def test_single_benchmarks_write_their_scores(run_tool, tiny_world, codec_flags, tmp_path, task):
    grammar = tmp_path / "words.gram"
    grammar.write_text(GRAMMAR)
    extra = [] if task == "asr" else ["--grammar", grammar, "--transcriber_processes", 0]
    extra += ["--system_prompt", "none"] if task == "sqa" else []
    run_tool(
        f"evaluate_{task}", "--model_name_or_path", tiny_world.model_dir, *codec_flags, "--mode", "1", "10",
        "--json_path", tiny_world.data_dir / f"{task}.jsonl", "--output_dir", tmp_path, *extra,
    )  # fmt: skip
    scores = json.loads((tmp_path / f"{task}_scores.json").read_text())
    good = {"asr": ("asr_wer", 0.0), "tts": ("tts_without_audio", 0), "sqa": ("sqa_s2t_accuracy", 1.0)}[task]
    assert scores[good[0]] == good[1]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "set MODEL_NAME_OR_PATH or STAGES_ROOT"),
        ({"MODEL_NAME_OR_PATH": "somewhere"}, "no test set"),
    ],
)
def test_the_script_says_what_it_lacks(variables, message):
    script = REPOSITORY / "scripts" / "deepspeed" / "evaluate_sts.sh"
    result = subprocess.run(
        ["bash", str(script)],
        env={"PATH": "/usr/bin:/bin", **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_the_script_finds_the_newest_run_of_every_stage(tiny_world, table_flags, tmp_path):
    """With PYTHON replaced by a command that shows how it was called."""
    for name, run in (("stage1", "old"), ("stage1", "new"), ("mtp10_stage2", "only")):
        folder = tmp_path / "stages" / f"finetune_glm4voice_{name}" / run
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    script = REPOSITORY / "scripts" / "deepspeed" / "evaluate_sts.sh"
    variables = {
        "PATH": "/usr/bin:/bin", "PYTHON": "echo", "STAGES_ROOT": str(tmp_path / "stages"),
        "ASR_JSON": "a.jsonl b.jsonl", "AUDIO_TOKENIZER_TYPE": "mel_vq", "EVALUATION_PROCESSES": "2", "LIMIT": "7",
    }  # fmt: skip
    result = subprocess.run(
        ["bash", str(script), "--x"], env=variables, capture_output=True, text=True, check=True
    )
    stages = tmp_path / "stages"
    expected = (
        f"--checkpoints stage1={stages}/finetune_glm4voice_stage1/new "
        f"stage4={stages}/finetune_glm4voice_mtp10_stage2/only"
    )
    assert expected in result.stdout
    assert "--asr a.jsonl b.jsonl" in result.stdout
    assert "torch.distributed.run" in result.stdout
    assert result.stdout.strip().endswith("--x")
    assert "stage 2 (mtp1_stage1) has no result" in result.stderr


@pytest.mark.slow
def test_two_processes_score_what_one_scores(tiny_world, tmp_path):
    grammar = tmp_path / "words.gram"
    grammar.write_text(GRAMMAR)
    variables = os.environ | {
        "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "MODEL_NAME_OR_PATH": f"tiny={tiny_world.model_dir}@turbo",
        "AUDIO_TOKENIZER_TYPE": "mel_vq", "AUDIO_TOKENIZER_PATH": str(tiny_world.codec_dir),
        "DATA_ROOT": str(tiny_world.data_dir), "GRAMMAR": str(grammar), "SYSTEM_PROMPT": "none", "SPEED_ITEMS": "1",
        "MAX_NEW_TOKENS": "60", "MASTER_PORT": "34571",
    }  # fmt: skip
    for task in ("asr", "tts", "sqa"):
        sample = tiny_world.samples[task]
        path = tmp_path / f"{task}.jsonl"
        path.write_text("\n".join(json.dumps({"id": str(number)} | sample) for number in range(3)) + "\n")
        variables[f"{task.upper()}_JSON"] = str(path)
    rows = []
    for processes in ("1", "2"):
        out = tmp_path / processes
        subprocess.run(
            ["bash", str(REPOSITORY / "scripts" / "deepspeed" / "evaluate_sts.sh"), "--transcriber_processes", "0"],
            env=variables | {"EVALUATION_PROCESSES": processes, "OUTPUT_DIR": str(out)},
            check=True,
        )  # fmt: skip
        assert len((out / "tiny-turbo" / "tts.jsonl").read_text().splitlines()) == 3
        (row,) = json.loads((out / "scores.json").read_text())
        assert row["tokens_per_second"] > 0
        rows.append({name: value for name, value in row.items() if name.startswith(("asr", "tts", "sqa"))})
    assert rows[0] == rows[1]
    assert rows[0]["sqa_s2t_accuracy"] == 1.0
