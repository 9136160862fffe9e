"""Running an evaluation: failures of single items, kills, batches, and several draws."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from vita_audio.audio import AudioError
from vita_audio.cli.evaluate import main
from vita_audio.evaluation import bench
from vita_audio.evaluation.bench import Bench, _batches
from vita_audio.evaluation.items import BenchmarkItem
from vita_audio.evaluation.journal import Journal, Utterance
from vita_audio.evaluation.settings import Settings
from vita_audio.evaluation.tasks import SpeechRecognition
from vita_audio.inference import GenerationOptions, SpeechPipeline, collect

COUNT = 6


@pytest.fixture
def flags(tiny_world, tmp_path, write_lines) -> list[str]:
    """Six recognition items of different lengths, in batches of two."""
    samples = []
    for number in range(COUNT):
        audio = tiny_world.audio(("question", "answer", "reading")[number % 3] + ".wav")
        samples.append({"id": f"item_{number}"} | tiny_world.samples["asr"] | {"audios": [audio]})
    path = write_lines(tmp_path / "asr.jsonl", samples)
    flags = [
        "--checkpoints", f"tiny={tiny_world.model_dir}@turbo", "--audio_tokenizer_type", "mel_vq",
        "--audio_tokenizer_path", tiny_world.codec_dir, "--device", "cpu", "--asr", path, "--speed_items", 0,
        "--batch_size", 2, "--output_dir", tmp_path / "out",
    ]  # fmt: skip
    return [str(flag) for flag in flags]


@pytest.fixture
def asked(monkeypatch) -> list[int]:
    """The number of requests in each call of the model."""
    calls: list[int] = []

    def note(events, count):
        calls.append(count)
        return collect(events, count)

    monkeypatch.setattr(bench, "collect", note)
    return calls


def row(tmp_path: Path) -> dict:
    (found,) = json.loads((tmp_path / "out" / "results.json").read_text())
    return found


def utterances(tmp_path: Path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "out/tiny-turbo/asr.jsonl").read_text().splitlines()]


def test_a_failed_item_is_named_counted_and_not_scored_and_tried_again(
    flags, tmp_path, asked, monkeypatch, capsys
):
    prompt, failing = SpeechPipeline.prompt, ["answer.wav"]

    def sometimes(self, conversation, *args, **more):
        if failing and str(conversation.audios[0]).endswith(failing[0]):
            raise AudioError("answer.wav: cut off", "truncated")
        return prompt(self, conversation, *args, **more)

    monkeypatch.setattr(SpeechPipeline, "prompt", sometimes)
    with pytest.raises(SystemExit, match="2 items failed"):
        main(flags)
    facts = row(tmp_path)["sets"]["asr"]
    assert facts["failed"] == 2
    assert facts["failures"] == dict.fromkeys(("item_1", "item_4"), "answer.wav: cut off")
    assert row(tmp_path)["asr_utterances"] == 4
    assert "2 of 6 items failed and are not scored" in " ".join(capsys.readouterr().out.split())
    assert [one["failure"] for one in utterances(tmp_path)].count(None) == 4
    page = (tmp_path / "out/tiny-turbo/asr.html").read_text()
    assert "failed: answer.wav: cut off" in page

    failing.clear()
    asked.clear()
    main(flags)
    assert sum(asked) == 2, "only what failed is asked again"
    assert row(tmp_path)["sets"]["asr"]["failed"] == 0
    assert row(tmp_path)["asr_utterances"] == COUNT


def test_a_batch_that_fails_is_tried_item_by_item(flags, tmp_path, monkeypatch):
    """As when memory runs out."""

    def small(events, count):
        if count > 1:
            raise RuntimeError("out of memory")
        return collect(events, count)

    main(flags)
    expected = utterances(tmp_path)
    monkeypatch.setattr(bench, "collect", small)
    main([*flags, "--output_dir", str(tmp_path / "again")])
    again = (tmp_path / "again/tiny-turbo/asr.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in again] == expected


def test_a_killed_run_goes_on_where_it_was_and_ends_the_same(flags, tmp_path, asked, monkeypatch):
    main([*flags, "--output_dir", str(tmp_path / "whole")])
    whole = (tmp_path / "whole/tiny-turbo/asr.jsonl").read_text()
    asked.clear()
    noted = bench.collect

    def killed(events, count):
        if len(asked) == 2:
            raise KeyboardInterrupt
        return noted(events, count)

    monkeypatch.setattr(bench, "collect", killed)
    with pytest.raises(KeyboardInterrupt):
        main(flags)
    assert not (tmp_path / "out/tiny-turbo/asr.jsonl").exists()
    (journal,) = (tmp_path / "out/tiny-turbo").glob(".asr.*.jsonl")
    assert len(journal.read_text().split()) > 0
    with journal.open("a") as file:
        file.write('{"id": "item_0", "refer')  # the kill cut a line off

    monkeypatch.setattr(bench, "collect", noted)
    asked.clear()
    main(flags)
    assert sum(asked) == COUNT - 4
    assert (tmp_path / "out/tiny-turbo/asr.jsonl").read_text() == whole
    assert not list((tmp_path / "out/tiny-turbo").glob(".asr.*.jsonl")), "the journal is not needed any more"


def test_a_batch_of_eight_gives_the_replies_of_a_batch_of_one(flags, tmp_path):
    """Also where a reply ends at its limit, which depends on the length of the prompt."""
    replies = []
    for size in ("1", "8"):
        main([*flags, "--batch_size", size, "--output_dir", str(tmp_path / size)])
        replies.append((tmp_path / size / "tiny-turbo/asr.jsonl").read_text())
    assert replies[0] == replies[1]


def test_replies_of_a_batch_end_at_their_own_limits(tiny_world, tmp_path):
    """A model that goes on speaking: the shorter prompt's reply is as long as it would be alone."""
    pipeline = SpeechPipeline.from_pretrained(
        tiny_world.model_dir, "mel_vq", tiny_world.codec_dir, device="cpu"
    )
    items = SpeechRecognition().read(tiny_world.data_dir / "asr.jsonl")
    (item,) = items
    longer = replace(
        item, id="b", conversation=replace(item.conversation, audios=(tiny_world.audio("reading.wav"),))
    )
    short = len(pipeline.prompt(item.conversation))
    said = {}
    for size in (1, 2):
        setup = Bench(
            pipeline,
            tmp_path / str(size),
            "set",
            options=GenerationOptions.greedy("vanilla"),
            batch_size=size,
        )
        utterances = setup.written(
            [item, longer], lambda one: one.answer, lambda prompt: 1 if prompt == short else 9
        )
        said[size] = {one.id: one.text for one in utterances}
    assert said[1] == said[2]
    assert len(said[1][item.id]) < len("the blue key")


def test_the_last_batches_of_several_processes_are_small():
    items = list(range(40))
    assert [len(batch) for batch in _batches(items, 16, 1)] == [16, 16, 8]
    sizes = [len(batch) for batch in _batches(items, 16, 2)]
    assert sum(sizes) == 40
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == 1


def test_other_weights_do_not_take_up_a_journal(tmp_path):
    with Journal(tmp_path, "set", "one") as journal:
        journal.add(Utterance("a", "b", "c"))
        journal.add(Utterance("d", "e", "", failure="broken"))
    assert set(Journal(tmp_path, "set", "one").finished) == {"a"}
    assert not Journal(tmp_path, "set", "two").finished
    assert not Journal(tmp_path, "set", None).finished


def test_several_draws_give_a_mean_and_a_spread(flags, tiny_world, tmp_path, capsys):
    stored = {"do_sample": True, "temperature": 8.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
    folder = tmp_path / "model"
    folder.mkdir()
    for file in tiny_world.model_dir.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "generation_config.json").write_text(json.dumps(stored))
    (tmp_path / "words.gram").write_text("#JSGF V1.0;\ngrammar w;\npublic <w> = ( river | blue | quiet )+;\n")
    asr = flags.index("--asr")
    arguments = [*flags[:asr], "--tts", str(tiny_world.data_dir / "tts.jsonl"), *flags[asr + 2 :]]
    arguments += ["--checkpoints", f"tiny={folder}@turbo", "--decoding", "published", "--samples", "3"]
    arguments += [
        "--grammar",
        str(tmp_path / "words.gram"),
        "--transcriber_processes",
        "0",
        "--max_new_tokens",
        "40",
    ]
    main(arguments)
    found = row(tmp_path)
    facts = found["sets"]["tts"]
    assert facts["runs"] == 3
    place = tmp_path / "out/tiny-turbo-published"
    drawn = []
    for name in ("tts", "tts_sample2", "tts_sample3"):
        (line,) = (place / f"{name}.jsonl").read_text().splitlines()
        above, below = json.loads(line)["marks"]["tts_wer"]
        drawn.append(above / below)
    assert found["tts_wer"] == pytest.approx(statistics.mean(drawn))
    assert facts["spread"]["tts_wer"] == pytest.approx(statistics.stdev(drawn))
    texts = {
        json.loads((place / f"{name}.jsonl").read_text())["text"]
        for name in ("tts", "tts_sample2", "tts_sample3")
    }
    assert len(texts) == 3, "each draw has its own seeds"
    assert "means of 3 draws" in capsys.readouterr().out


def test_settings_that_answer_nothing_are_refused():
    with pytest.raises(ValueError, match="--samples 0: give 1 or more"):
        Settings(samples=0)


def test_items_are_dealt_by_length_without_reading_damaged_audio(tiny_world, tmp_path):
    """A recording that cannot be measured does not stop the dealing; its item fails when it is asked."""
    (tmp_path / "broken.wav").write_bytes(b"RIFF")
    (item,) = SpeechRecognition().read(tiny_world.data_dir / "asr.jsonl")
    broken: BenchmarkItem = replace(
        item, id="x", conversation=replace(item.conversation, audios=(str(tmp_path / "broken.wav"),))
    )
    pipeline = SpeechPipeline.from_pretrained(
        tiny_world.model_dir, "mel_vq", tiny_world.codec_dir, device="cpu"
    )
    setup = Bench(pipeline, tmp_path, "set", options=GenerationOptions.greedy("turbo"))
    good, bad = SpeechRecognition().run(setup, [item, broken])
    assert (good.failure, good.text) == (None, "the blue key")
    assert "broken.wav" in bad.failure


@pytest.mark.slow
def test_two_processes_killed_in_the_middle_and_started_again_give_the_scores_of_one(
    tiny_world, tmp_path, write_lines
):
    samples = [
        {"id": f"{number:02}"}
        | tiny_world.samples["asr"]
        | {"audios": [tiny_world.audio(("question", "answer", "reading")[number % 3] + ".wav")]}
        for number in range(60)
    ]
    variables = os.environ | {
        "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "MODEL_NAME_OR_PATH": f"tiny={tiny_world.model_dir}@vanilla",
        "AUDIO_TOKENIZER_TYPE": "mel_vq", "AUDIO_TOKENIZER_PATH": str(tiny_world.codec_dir), "BATCH_SIZE": "1",
        "ASR_JSON": str(write_lines(tmp_path / "asr.jsonl", samples)), "SPEED_ITEMS": "0", "MASTER_PORT": "34573",
    }  # fmt: skip
    script = Path(__file__).parents[2] / "scripts" / "deepspeed" / "evaluate_sts.sh"

    def start(name: str, processes: int) -> subprocess.Popen:
        more = {"OUTPUT_DIR": str(tmp_path / name), "EVALUATION_PROCESSES": str(processes)}
        return subprocess.Popen(
            ["bash", str(script)],
            env=variables | more,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    assert start("one", 1).wait(timeout=300) == 0
    killed = start("two", 2)
    place = tmp_path / "two" / "tiny-vanilla"

    def written() -> int:
        return sum(path.read_text().count('"id"') for path in place.glob(".asr.*.jsonl"))

    while written() < 5 and killed.poll() is None:
        time.sleep(0.02)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait(timeout=60)
    before = written()
    assert 0 < before < len(samples), "it was killed in the middle"
    assert start("two", 2).wait(timeout=300) == 0
    for name in ("asr.jsonl", "asr_scores.json"):
        results = [(tmp_path / run / "tiny-vanilla" / name).read_text() for run in ("one", "two")]
        assert results[0] == results[1]
