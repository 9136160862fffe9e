"""The command lines, run as a user runs them, on a tiny model."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from vita_audio.evaluation import normalisers
from vita_audio.inference import SpeechPipeline

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
    rows = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(row["stage"], row["mode"]) for row in rows] == [("tiny", "vanilla"), ("tiny", "1 10")]
    for row in rows:
        assert (row["asr_wer"], row["sqa_s2t_accuracy"]) == (0.0, 1.0)
        assert row["tts_wer"] == row["tts_floor_wer"]
        assert row["tokens_per_second"] > 0
        assert row["first_chunk_seconds"] > 0
    assert re.search(r"\| tiny +\| 1 10 +\|", (tmp_path / "out" / "results.md").read_text())
    assert (tmp_path / "out" / "tiny-1-10" / "wav" / "tts" / "tts_1.wav").is_file()

    def refuse(*_, **__):
        raise AssertionError("a finished row was computed again")

    monkeypatch.setattr(SpeechPipeline, "open", refuse)
    run_tool("evaluate_table", *table_flags)
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == rows
    for changed in (["--quantization", "int8"], ["--dtype", "bfloat16"]):
        with pytest.raises(AssertionError, match="computed again"):
            run_tool("evaluate_table", *table_flags, *changed)


def test_every_test_set_has_its_own_scores_and_files(
    run_tool, table_flags, tiny_world, tmp_path, write_lines
):
    """Two sets of one file name, of which the second has other answers."""
    right, wrong = tiny_world.samples["sqa"], json.loads(json.dumps(tiny_world.samples["sqa"]))
    wrong["messages"][-1]["content"] = ["red", "green"]
    wrong["audios"] = wrong["audios"][:1]
    for folder, sample in (("llama", right), ("trivia", wrong)):
        write_lines(tmp_path / folder / "test.jsonl", [sample])
    run_tool(
        "evaluate_table", *table_flags, "--checkpoints", f"tiny={tiny_world.model_dir}@turbo",
        "--speed_items", 0, "--data_root", tiny_world.data_dir,
        "--sqa", tmp_path / "llama" / "test.jsonl", tmp_path / "trivia" / "test.jsonl",
    )  # fmt: skip
    (row,) = json.loads((tmp_path / "out" / "results.json").read_text())
    assert row["llama_test.sqa_s2t_accuracy"] == 1.0
    assert row["trivia_test.sqa_s2t_accuracy"] == 0.0
    assert "sqa_s2t_accuracy" not in row, "nothing is pooled"
    folder = tmp_path / "out" / "tiny-turbo"
    assert json.loads((folder / "trivia_test.jsonl").read_text())["reference"] == ["red", "green"]
    assert (folder / "wav" / "llama_test" / "1.wav").is_file()
    table = (tmp_path / "out" / "results.md").read_text()
    assert "### speech QA · llama_test · 1 item" in table
    assert "### speech QA · trivia_test · 1 item" in table
    with pytest.raises(SystemExit, match="two test sets have this name"):
        run_tool("evaluate_table", *table_flags, "--sqa", *[f"a={tmp_path / 'llama' / 'test.jsonl'}"] * 2)


def test_greedy_and_published_decoding_stand_side_by_side(
    run_tool, table_flags, tmp_path, tiny_world, capsys
):
    folder = tmp_path / "penalised"
    shutil.copytree(tiny_world.model_dir, folder)
    stored = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05}
    (folder / "generation_config.json").write_text(json.dumps(stored))
    run_tool(
        "evaluate_table", *table_flags, "--checkpoints", f"tiny={folder}@turbo", "--decoding", "greedy", "published"
    )  # fmt: skip
    greedy, published = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["decoding"] for row in (greedy, published)] == ["greedy", "published"]
    for task in ("asr", "tts", "sqa"):
        plain, drawn = greedy["sets"][task]["options"], published["sets"][task]["options"]
        assert (plain["do_sample"], plain["repetition_penalty"]) == (False, 1.0)
        assert (drawn["do_sample"], drawn["repetition_penalty"]) == (task == "tts", 1.05)
        assert plain["max_new_tokens"] == drawn["max_new_tokens"] == 1024
    options = published["sets"]["tts"]["options"]
    assert (options["temperature"], options["top_k"], options["top_p"]) == (0.7, 20, 0.8)
    assert any("as published: temperature 0.7" in note for note in published["notes"])

    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["command"] == "evaluate"
    assert run["arguments"]["speed_items"] == 1
    assert set(run["data"]) == {"asr", "tts", "sqa"}
    said = capsys.readouterr().out.rstrip().splitlines()
    assert said[-1] == str(tmp_path / "out" / "results.md")
    assert max(map(len, said[:-1])) <= 80


def test_foreign_prompts_a_missing_grammar_and_the_system_message_are_said(
    run_tool, tiny_world, codec_flags, tmp_path, write_lines
):
    sample = json.loads(json.dumps(tiny_world.samples["asr"]))
    sample["messages"][0]["content"] = "Transcribe: <|audio|>"
    path = write_lines(tmp_path / "foreign.jsonl", [sample])
    run_tool(
        "evaluate_table", "--checkpoints", f"tiny={tiny_world.model_dir}@turbo", *codec_flags, "--asr", path,
        "--sqa", tiny_world.data_dir / "sqa.jsonl", "--data_root", tiny_world.data_dir, "--speed_items", 0,
        "--transcriber_processes", 0, "--output_dir", tmp_path / "out",
    )  # fmt: skip
    (row,) = json.loads((tmp_path / "out" / "results.json").read_text())
    notes = " ".join(row["notes"])
    assert "foreign: 1 of 1 prompts differ in wording from the training data" in notes
    assert "sqa: heard by pocketsphinx without a grammar" in notes
    assert "sqa: questions without a system message were asked with no system message" in notes
    assert row["sets"]["sqa"]["system"] is None
    said = " ".join((tmp_path / "out" / "results.md").read_text().split())
    assert "without a grammar, which mishears much of open speech" in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--transcriber", "whisper", "--transcriber_path", "nowhere"],
            "nowhere: not a folder with Whisper's",
        ),
        (["--transcriber", "whisper", "--transcriber_path", "a/b"], "a/b: not a folder with Whisper's"),
        (
            ["--transcriber", "whisper", "--transcriber_path", "/nowhere"],
            "/nowhere: not a folder with Whisper's",
        ),
        (["--transcriber", "paraformer"], "the paraformer transcriber needs FunASR"),
        (["--grammar", "nowhere.gram"], "nowhere.gram: no such grammar file"),
        (["--batch_size", -1], "--batch_size -1: give 1 or more"),
        (["--max_new_tokens", 0], "--max_new_tokens 0: give 1 or more"),
        (["--speed_items", -1], "--speed_items -1: give 0 or more"),
        (["--transcriber_processes", -1], "--transcriber_processes -1: give 0 or more"),
        (["--limit", 0], "a limit of 0 items"),
        (["--checkpoints", "tiny=nowhere"], "nowhere"),
        (["--checkpoints", "tiny"], "--checkpoints tiny: write STAGE=DIR"),
        (["--audio_tokenizer_type", "sensevoice_mel_vq"], "give --audio_tokenizer_type mel_vq"),
        (["--text_normaliser", "libritts"], "the libritts normaliser needs WeTextProcessing"),
    ],
)
def test_the_table_refuses_in_one_line_before_a_model_is_loaded(
    run_tool, table_flags, monkeypatch, flags, message
):
    monkeypatch.setattr(SpeechPipeline, "open", lambda *_, **__: pytest.fail("a model was loaded"))
    monkeypatch.setattr(normalisers, "import_module", raise_import_error)
    normalisers._text_normaliser.cache_clear()
    with pytest.raises(SystemExit) as exit_:
        run_tool("evaluate_table", *table_flags, *flags)
    assert message in str(exit_.value)
    assert "\n" not in str(exit_.value)


def raise_import_error(name: str) -> None:
    raise ImportError(name)


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
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["arguments"]["max_new_tokens"] == 1024
    assert run["arguments"]["do_sample"] is False


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
    runs = (("stage1", "b", 3), ("stage1", "a", 1), ("stage1", "c", 2), ("mtp10_stage2", "only", 1))
    for name, run, age in runs:  # the newest is neither the first nor the last by name
        folder = tmp_path / "stages" / f"finetune_glm4voice_{name}" / run
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        os.utime(folder / "config.json", (10**9 + age, 10**9 + age))
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
        f"--checkpoints stage1={stages}/finetune_glm4voice_stage1/b "
        f"stage4={stages}/finetune_glm4voice_mtp10_stage2/only"
    )
    assert expected in result.stdout
    assert "--asr a.jsonl b.jsonl" in result.stdout
    assert "torch.distributed.run" in result.stdout
    assert result.stdout.strip().endswith("--x")
    assert "stage 2 (mtp1_stage1) has no result" in result.stderr


@pytest.fixture
def spelled_out(monkeypatch):
    """The texts that go through WeTextProcessing, with a stand-in: it is an extra of 700 MB."""
    texts: list[str] = []

    class Normalizer:
        def normalize(self, text: str) -> str:
            texts.append(text)
            return text

    monkeypatch.setattr(normalisers, "import_module", lambda name: SimpleNamespace(Normalizer=Normalizer))
    normalisers._text_normaliser.cache_clear()
    yield texts
    normalisers._text_normaliser.cache_clear()


@pytest.mark.parametrize("name", ["libritts", "seedtts"])
def test_the_published_commands_take_their_arguments(run_tool, tiny_world, tmp_path, name, spelled_out):
    grammar = tmp_path / "words.gram"
    grammar.write_text(GRAMMAR)
    if name == "libritts":
        arguments = ["--json_path", tiny_world.data_dir / "tts.jsonl"]
    else:
        (tmp_path / "en").mkdir()
        (tmp_path / "en" / "meta.lst").write_text(
            f"utt|hello|{tiny_world.audio('answer.wav')}|the quiet river runs\n"
        )
        arguments = ["--data_path", tmp_path / "en" / "meta.lst", "--speaker_prompt"]
    run_tool(
        f"evaluate_{name}", *arguments, "--model_name_or_path", tiny_world.model_dir, "--output_dir", tmp_path / "out",
        "--audio_tokenizer_path", tiny_world.codec_dir, "--audio_tokenizer_type", "mel_vq", "--batch_size", 1,
        "--num_workers", 0, "--transcriber", "pocketsphinx", "--grammar", grammar, "--transcriber_processes", 0,
        "--max_new_tokens", 60,
    )  # fmt: skip
    (row,) = json.loads((tmp_path / "out" / "results.json").read_text())
    (facts,) = row["sets"].values()
    assert facts["options"]["do_sample"] is True
    assert row["tts_wer" if name == "libritts" else "seed_tts_wer"] > 0
    assert ("the quiet river runs" in spelled_out) is (name == "libritts")


def test_tts_may_be_counted_as_seed_tts_counts(run_tool, tiny_world, codec_flags, tmp_path):
    grammar = tmp_path / "words.gram"
    grammar.write_text(GRAMMAR)
    run_tool(
        "evaluate_tts", "--model_name_or_path", tiny_world.model_dir, *codec_flags, "--mode", "turbo",
        "--metric", "seed-tts-zh", "--json_path", tiny_world.data_dir / "tts.jsonl", "--output_dir", tmp_path,
        "--grammar", grammar, "--transcriber_processes", 0,
    )  # fmt: skip
    assert json.loads((tmp_path / "tts_scores.json").read_text())["seed_tts_utterances"] == 1


def test_the_script_scores_the_published_sets_that_are_there(tmp_path):
    """With PYTHON replaced by a command that shows how it was called; test_benchmarks.py tests which sets these are."""
    (tmp_path / "data").mkdir()
    result = tmp_path / "output" / "LM" / "finetune_glm4voice_mtp10_stage2" / "20250101"
    for folder in (
        result,
        result.with_name("20260101"),
        result.parents[1] / "finetune_glm4voice_stage1" / "20250101",
    ):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    script = REPOSITORY / "scripts" / "deepspeed" / "evaluate_sts.sh"
    variables = {
        "PATH": "/usr/bin:/bin",
        "PYTHON": "echo",
        "ROOT_PATH": str(tmp_path),
        "EVALUATION_PROCESSES": "1",
    }

    def said(**more: str) -> str:
        command = ["bash", str(script), "20250101"]
        return subprocess.run(
            command, env=variables | more, capture_output=True, text=True, check=True
        ).stdout

    for words in (
        f"--checkpoints stage4={result} --",
        f"--benchmarks paper --root {tmp_path} ",
        f"--output_dir {tmp_path}/output/evaluation/20250101",
    ):
        assert words in said()
    for left_to_the_benchmark in ("--decoding", "--transcriber", "--text_normaliser"):
        assert left_to_the_benchmark not in said()
    assert "--benchmarks seed-tts-zh own.yaml --root" in said(BENCHMARKS="seed-tts-zh own.yaml")
    quickstart = f"--benchmarks {REPOSITORY}/configs/quickstart/benchmarks.yaml --root corpus "
    assert quickstart in said(CORPUS="corpus")
    assert "--benchmarks" not in said(ASR_JSON="a.jsonl")


@pytest.mark.slow
def test_two_processes_and_two_nodes_score_what_one_process_scores(tiny_world, tmp_path):
    """A node is a launcher of its own; the second joins the first over loopback."""
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
    command = [
        "bash",
        str(REPOSITORY / "scripts" / "deepspeed" / "evaluate_sts.sh"),
        "--transcriber_processes",
        "0",
    ]
    for nodes, processes in ((1, 1), (1, 2), (2, 1)):
        out = tmp_path / f"{nodes}x{processes}"
        more = {"EVALUATION_PROCESSES": str(processes), "OUTPUT_DIR": str(out), "NNODES": str(nodes)}
        if nodes > 1:
            more |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "34575"}
        started = [
            subprocess.Popen(command, env=variables | more | {"NODE_RANK": str(node)})
            for node in range(nodes)
        ]
        assert [process.wait(timeout=600) for process in started] == [0] * nodes
        assert len((out / "tiny-turbo" / "tts.jsonl").read_text().splitlines()) == 3
        (row,) = json.loads((out / "results.json").read_text())
        assert row["tokens_per_second"] > 0
        rows.append({name: value for name, value in row.items() if name.startswith(("asr", "tts", "sqa"))})
    assert rows[0] == rows[1] == rows[2]
    assert rows[0]["sqa_s2t_accuracy"] == 1.0
