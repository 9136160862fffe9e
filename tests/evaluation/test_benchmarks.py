"""Benchmarks by name: where their files are, what their scores depend on, and what is said when they are missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from vita_audio.cli.evaluate import main
from vita_audio.cli.prepare_benchmark import main as prepare_main
from vita_audio.evaluation.benchmarks import (
    BenchmarkError,
    choose,
    published_benchmarks,
    read_benchmarks,
)
from vita_audio.evaluation.preparation import prepared_checksum

LISTS = "data/jsonl"
SEED_TTS = "data/BytedanceSpeech/seed-tts-eval/seedtts_testset"
PLACES = {
    "llama-questions": ("sqa", f"{LISTS}/fixie-ai/llama-questions/test.jsonl", "whisper"),
    "trivia-qa": ("sqa", f"{LISTS}/fixie-ai/trivia_qa-audio/validation.jsonl", "whisper"),
    "web-questions": ("sqa", f"{LISTS}/fixie-ai/spoken-web-questions/test.jsonl", "whisper"),
    "librispeech-dev-clean": ("asr", f"{LISTS}/fixie-ai/librispeech_asr/validation.clean.jsonl", None),
    "librispeech-dev-other": ("asr", f"{LISTS}/fixie-ai/librispeech_asr/validation.other.jsonl", None),
    "librispeech-test-clean": ("asr", f"{LISTS}/fixie-ai/librispeech_asr/test.clean.jsonl", None),
    "librispeech-test-other": ("asr", f"{LISTS}/fixie-ai/librispeech_asr/test.other.jsonl", None),
    "wenetspeech-net": ("asr", f"{LISTS}/wenet-e2e/wenetspeech/TEST_NET.jsonl", None),
    "wenetspeech-meeting": ("asr", f"{LISTS}/wenet-e2e/wenetspeech/TEST_MEETING.jsonl", None),
    "aishell-1": ("asr", f"{LISTS}/shenyunhang/AISHELL-1/test.jsonl", None),
    "fleurs-zh": ("asr", f"{LISTS}/google/fleurs/cmn_hans_cn.test.jsonl", None),
    "fleurs-en": ("asr", f"{LISTS}/google/fleurs/en_us.test.jsonl", None),
    "libritts-test-clean": ("tts", f"{LISTS}/mythicinfinity/libritts/test.clean.jsonl", "whisper"),
    "seed-tts-zh": ("seed_tts", f"{SEED_TTS}/zh/meta.lst", "paraformer"),
    "seed-tts-en": ("seed_tts", f"{SEED_TTS}/en/meta.lst", "whisper"),
    "seed-tts-hard": ("seed_tts", f"{SEED_TTS}/zh/hardcase.lst", "paraformer"),
}


def test_the_papers_benchmarks_are_where_the_original_has_them():
    found = {
        one.name: (one.task, one.file, one.recogniser.get("name")) for one in published_benchmarks().values()
    }
    assert found == PLACES


@pytest.mark.parametrize("name", PLACES)
def test_a_paper_benchmark_says_all_that_its_score_depends_on(name):
    one = published_benchmarks()[name]
    assert one.decoding == "published"
    assert one.language == ("zh" if name in CHINESE else "en")
    assert one.normaliser == ("libritts" if name == "libritts-test-clean" else "words")
    recogniser = one.make_recogniser(Path("/root"))
    assert (recogniser is None) == (one.task == "asr")
    assert recogniser is None or recogniser.name != "pocketsphinx"
    if one.task == "seed_tts":
        task = one.make_task()
        assert (task.language, task.speaker_prompt) == (one.language, True)
        assert one.make_speaker(Path("/root")).name == "wavlm"
    for row in one.published:
        assert row["source"]


CHINESE = {"wenetspeech-net", "wenetspeech-meeting", "aishell-1", "fleurs-zh", "seed-tts-zh", "seed-tts-hard"}


def test_paper_takes_what_is_there_and_names_the_rest_with_its_command(tmp_path):
    for name in ("llama-questions", "seed-tts-hard"):
        path = tmp_path / PLACES[name][1]
        path.parent.mkdir(parents=True)
        path.touch()
    chosen, missing = choose(["paper"], tmp_path)
    assert [one.name for one in chosen] == ["llama-questions", "seed-tts-hard"]
    assert len(missing) == len(PLACES) - 2
    (line,) = [line for line in missing if line.startswith("fleurs-zh:")]
    assert f"run tools/prepare_benchmark.py fleurs-zh SOURCE --root {tmp_path}" in line
    assert "https://huggingface.co/datasets/google/fleurs" in line


def test_a_benchmark_that_was_named_must_be_there(tmp_path):
    with pytest.raises(BenchmarkError, match=r"aishell-1: .* is missing; get .*openslr"):
        choose(["aishell-1"], tmp_path)
    with pytest.raises(
        BenchmarkError, match=r"no such benchmark; give a YAML file, paper, or of .*aishell-1"
    ):
        choose(["aishell"], tmp_path)


def test_the_quickstarts_benchmarks_are_the_test_sets_of_its_corpus(tmp_path):
    (tmp_path / "grammar.jsgf").touch()
    file = Path(__file__).parents[2] / "configs" / "quickstart" / "benchmarks.yaml"
    found = read_benchmarks(file)
    assert {name: (one.task, one.file) for name, one in found.items()} == {
        f"{task}_test": (task, f"{task}_test.jsonl") for task in ("asr", "tts", "sqa", "text_qa")
    }
    for one in found.values():
        recogniser = one.make_recogniser(tmp_path)
        assert one.decoding == "greedy"
        assert recogniser is None or recogniser.grammar == str(tmp_path / "grammar.jsgf")


def test_models_are_found_below_the_root_or_by_their_name(tmp_path):
    one = published_benchmarks()["llama-questions"]
    assert one.make_recogniser(tmp_path).path == "openai/whisper-large-v3"
    folder = tmp_path / "models/openai/whisper-large-v3"
    folder.mkdir(parents=True)
    assert one.make_recogniser(tmp_path).path == str(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "cannot be read"),
        ("[]", "must map names"),
        ("a: 1", "a: must be a mapping"),
        ("a: {task: asr}", "a: needs a text for 'file'"),
        ("a/b: {task: asr, file: x}", "a/b: a name has up to 64 letters"),
        ("a: {task: mt, file: x}", "a: 'task' must be of asr"),
        ("a: {task: asr, file: x, metric: wer}", "a: unknown key 'metric'; known: decoding"),
        ("a: {task: asr, file: x, decoding: beam}", "a: 'decoding' must be of greedy, published"),
        ("a: {task: asr, file: x, normaliser: y}", "a: 'normaliser' must be of words"),
        ("a: {task: seed_tts, file: x}", "a: 'language' must be of zh, en"),
        ("a: {task: sqa, file: x, recogniser: {nam: y}}", "a: 'recogniser' has an unknown key 'nam'"),
        ("a: {task: sqa, file: x, recogniser: y}", "a: 'recogniser' must be a mapping"),
        (
            "a: {task: sqa, file: x, published: [{model: y}]}",
            "a: each row of 'published' needs model, source",
        ),
        ("a: {task: sqa, file: x, prepare: {page: y}}", "a: 'prepare' needs page, source, from and layout"),
        ("a: {task: asr, file: x}\na: {task: asr, file: y}", "given twice"),
    ],
)
def test_a_wrong_entry_is_one_line_with_file_and_field(tmp_path, text, message):
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(BenchmarkError, match=message) as error:
        read_benchmarks(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


@pytest.fixture
def own(tiny_world, tmp_path) -> Path:
    """Benchmarks of one's own, next to their files; one with other answers, and a row that somebody published."""
    sample = json.loads(json.dumps(tiny_world.samples["sqa"]))
    sample["messages"][-1]["content"] = ["red", "green"]
    sample["audios"] = [tiny_world.audio("question.wav")]
    (tmp_path / "wrong.jsonl").write_text(json.dumps(sample) + "\n")
    (tmp_path / "words.gram").write_text(
        "#JSGF V1.0;\ngrammar words;\npublic <words> = ( river | blue | quiet )+;\n"
    )
    recogniser = {"name": "pocketsphinx", "grammar": "words.gram"}
    published = {"model": "Other", "source": "a paper, Table 2", "scores": {"sqa_s2t_accuracy": 0.756}}
    entries = {
        "heart": {
            "task": "sqa", "file": str(tiny_world.data_dir / "sqa.jsonl"), "recogniser": recogniser,
            "published": [published],
        },
        "wrong": {"task": "sqa", "file": "wrong.jsonl", "recogniser": recogniser},
        "letters": {"task": "asr", "file": str(tiny_world.data_dir / "asr.jsonl"), "decoding": "published"},
    }  # fmt: skip
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(entries))
    return tmp_path / "own.yaml"


def test_own_benchmarks_have_a_row_for_each_set_with_published_rows_beside(own, tiny_world, tmp_path, capsys):
    arguments = [
        "--checkpoints", f"tiny={tiny_world.model_dir}@turbo", "--audio_tokenizer_type", "mel_vq",
        "--audio_tokenizer_path", tiny_world.codec_dir, "--device", "cpu", "--benchmarks", own,
        "--transcriber_processes", 0, "--speed_items", 0, "--system_prompt", "none", "--output_dir", tmp_path / "out",
    ]  # fmt: skip
    main([str(argument) for argument in arguments])
    rows = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["decoding"] for row in rows] == ["greedy", "published"]
    greedy, published = rows
    assert set(greedy["sets"]) == {"heart", "wrong"}
    assert set(published["sets"]) == {"letters"}
    assert (greedy["heart.sqa_s2t_accuracy"], greedy["wrong.sqa_s2t_accuracy"]) == (1.0, 0.0)
    assert not [key for key in greedy if key.startswith("sqa_")], "nothing is pooled"
    facts = greedy["sets"]["heart"]
    assert facts["recogniser"] == "pocketsphinx, restricted to words.gram"
    assert len(facts["checksum"]) == len(greedy["weights"]) == 16
    assert greedy["versions"]["torch"]

    said = capsys.readouterr().out
    heart = said.split("### speech QA · heart")[1].split("###")[0]
    assert [line.split("|")[1].strip() for line in heart.splitlines() if line.startswith("|")][2:] == [
        "tiny",
        "Other",
    ]
    assert "75.6" in heart
    assert "Other, published: a paper, Table 2" in " ".join(said.split())
    page = (tmp_path / "out" / "results.html").read_text()
    assert 'href="tiny-turbo/heart.html"' in page
    assert "75.6" in page
    utterances = (tmp_path / "out" / "tiny-turbo" / "heart.html").read_text()
    assert 'src="wav/heart/sqa_1.wav"' in utterances


@pytest.mark.slow
def test_every_miniature_runs_through_the_script_and_fills_its_table(
    miniature, counts, tiny_world, whisper, sensevoice, released, tmp_path
):
    """With small untrained recognisers behind the real interfaces."""
    root = tmp_path / "root"
    for name in counts:
        prepare_main([name, str(miniature(name)), "--root", str(root)])
    variables = os.environ | {
        "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "MODEL_NAME_OR_PATH": f"tiny={tiny_world.model_dir}@turbo",
        "AUDIO_TOKENIZER_TYPE": "mel_vq", "AUDIO_TOKENIZER_PATH": str(tiny_world.codec_dir), "ROOT_PATH": str(root),
        "TRANSCRIBER": "whisper", "TRANSCRIBER_PATH": whisper, "CHINESE_TRANSCRIBER": "sensevoice",
        "CHINESE_TRANSCRIBER_PATH": str(sensevoice), "SPEAKER_MODEL": "wavlm", "SPEAKER_MODEL_PATH": str(released),
        "TEXT_NORMALISER": "words", "MAX_NEW_TOKENS": "30", "SYSTEM_PROMPT": "none", "BENCHMARKS": "paper",
        "OUTPUT_DIR": str(tmp_path / "out"),
    }  # fmt: skip
    script = Path(__file__).parents[2] / "scripts" / "deepspeed" / "evaluate_sts.sh"
    run = subprocess.run(
        ["bash", str(script), "--transcriber_processes", "0"],
        env=variables, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    (row,) = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {name: facts["items"] for name, facts in row["sets"].items()} == counts
    scores = {"asr": "asr_wer", "tts": "tts_wer", "sqa": "sqa_s2s_accuracy", "seed_tts": "seed_tts_wer"}
    for name, facts in row["sets"].items():
        prefix = "" if name == "libritts-test-clean" else f"{name}."  # the only set of its task
        assert row[f"{prefix}{scores[facts['task']]}"] is not None, name
        if facts["task"] == "seed_tts":
            silent = row[f"{prefix}seed_tts_without_audio"] == counts[name]
            assert silent == (f"{prefix}seed_tts_similarity" not in row)
        assert facts["failed"] == 0
        assert facts["checksum"] == prepared_checksum(Path(facts["file"]))
        assert f" · {name} · {counts[name]} items" in run.stdout
    assert any(key.endswith("seed_tts_similarity") for key in row)
    assert "changed since" not in run.stdout

    # A set that is edited after its preparation is noticed.
    path = root / PLACES["fleurs-en"][1]
    path.write_text(path.read_text().replace("river", "rivers").replace("RIVER", "RIVERS"))
    run = subprocess.run(
        ["bash", str(script), "--transcriber_processes", "0"],
        env=variables | {"BENCHMARKS": "fleurs-en"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "fleurs-en: changed since tools/prepare_benchmark.py wrote it" in " ".join(run.stdout.split())
