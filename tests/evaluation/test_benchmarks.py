"""Test sets, scores and the table, on a tiny model that knows its three samples by heart."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from vita_audio.evaluation.asr import run_asr, score_asr
from vita_audio.evaluation.benchmark import Listener, Utterance, read_test_set
from vita_audio.evaluation.sqa import run_sqa, score_sqa
from vita_audio.evaluation.table import BenchmarkSets, Table, markdown, measure_speed, score_row
from vita_audio.evaluation.tts import run_codec_floor, run_tts, score_codec_floor, score_seed_tts, score_tts

from vita_audio.evaluation.transcribers import TranscriberConfig, TranscriberPool
from vita_audio.inference import GenerationOptions, SpeechPipeline

OPTIONS = GenerationOptions(max_new_tokens=120)


@pytest.fixture(scope="module")
def pipeline(tiny_world) -> SpeechPipeline:
    return SpeechPipeline.from_pretrained(tiny_world.model_dir, "mel_vq", tiny_world.codec_dir, device="cpu")


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    grammar = tmp_path_factory.mktemp("grammar") / "words.gram"
    grammar.write_text("#JSGF V1.0;\ngrammar words;\npublic <words> = ( river | blue | quiet )+;\n")
    with TranscriberPool(TranscriberConfig(grammar=str(grammar)), processes=0) as pool:
        yield pool


@pytest.fixture
def listener(pipeline, pool) -> Listener:
    return Listener(pipeline.codec, pool)


def test_asr_compares_the_text_with_the_reference(pipeline, tiny_world):
    items = read_test_set(tiny_world.data_dir / "asr.jsonl")
    utterances = run_asr(pipeline, items, OPTIONS)
    assert utterances == [Utterance("asr_1", "the blue key", "the blue key")]
    assert score_asr(utterances)["asr_wer"] == 0.0
    wrong = [Utterance("1", "the blue key", "the key"), Utterance("2", "a", "")]
    assert score_asr(wrong)["asr_wer"] == 2 / 4


def test_the_length_limit_of_recognition_does_not_depend_on_the_reference(pipeline, tiny_world, monkeypatch):
    (item,) = read_test_set(tiny_world.data_dir / "asr.jsonl")
    limits, stream_many = [], pipeline.backend.stream_many

    def note(requests):
        limits.extend(request.options.max_new_tokens for request in requests)
        return stream_many(requests)

    monkeypatch.setattr(pipeline.backend, "stream_many", note)
    for answer in ("a", "a very long reference " * 50):
        run_asr(pipeline, [replace(item, answer=answer)], OPTIONS)
    assert limits == [len(pipeline.prompt(item.conversation)) + 32] * 2


def test_tts_writes_what_it_says_and_has_it_heard(pipeline, tiny_world, listener, tmp_path):
    items = read_test_set(tiny_world.data_dir / "tts.jsonl")
    (utterance,) = run_tts(pipeline, items, OPTIONS, listener, tmp_path)
    assert (utterance.reference, utterance.text) == ("the quiet river runs", "the quiet river runs")
    assert (tmp_path / utterance.wav).stat().st_size > 16_000
    assert set(utterance.heard.split()) <= {"river", "blue", "quiet"}
    floor, natural = run_codec_floor(pipeline.codec, items, listener, tmp_path)
    assert floor[0].heard == utterance.heard  # it reads with the very codes of the recording
    assert score_tts([utterance])["tts_wer"] == score_codec_floor(floor, natural)["tts_floor_wer"]


def test_the_same_codes_are_recognised_once(pipeline, pool, tmp_path, monkeypatch):
    submitted = []
    monkeypatch.setattr(pool, "submit", lambda audio: submitted.append(audio) or f"future {len(submitted)}")
    listener = Listener(pipeline.codec, pool)
    first, second = (listener.hear([1, 2, 3], tmp_path / name) for name in ("a.wav", "b.wav"))
    other = listener.hear([3, 2, 1], tmp_path / "c.wav")
    assert first == second != other
    assert len(submitted) == 2
    assert (tmp_path / "a.wav").read_bytes() == (tmp_path / "b.wav").read_bytes()


def test_speech_qa_scores_text_and_speech(pipeline, tiny_world, listener, tmp_path):
    items = read_test_set(tiny_world.data_dir / "sqa.jsonl")
    (utterance,) = run_sqa(pipeline, items, OPTIONS, listener, tmp_path)
    assert utterance.reference == ["blue"]
    assert score_sqa([utterance])["sqa_s2t_accuracy"] == 1.0
    assert (tmp_path / utterance.wav).is_file()


def test_replies_without_speech_stay_in_the_denominator():
    spoken = Utterance("1", ["eight"], "eight", heard="eighteen", wav="1.wav")
    silent = Utterance("2", ["two"], "two")
    scores = score_sqa([spoken, silent])
    assert (scores["sqa_s2t_accuracy"], scores["sqa_s2s_accuracy"]) == (1.0, 0.5)
    assert (scores["sqa_s2t_accuracy_whole_words"], scores["sqa_s2s_accuracy_whole_words"]) == (1.0, 0.0)
    assert scores["sqa_without_audio"] == 1

    scores = score_tts([Utterance("1", "a b", "", heard="a b"), Utterance("2", "c d", "")])
    assert (scores["tts_wer"], scores["tts_wer_answered"], scores["tts_without_audio"]) == (0.5, 0.0, 1)
    assert (
        score_seed_tts([Utterance("1", "a", "", "a"), Utterance("2", "b", "")], "en")["seed_tts_wer"] == 0.5
    )


def test_punctuation_does_not_count_as_words():
    assert (
        score_tts([Utterance("1", "Well-known, isn't it?", "", heard="well known isn t it")])["tts_wer"] == 0
    )


def test_speed_is_measured_mode_beside_mode_on_single_replies(pipeline, tiny_world, monkeypatch):
    (item,) = read_test_set(tiny_world.data_dir / "tts.jsonl")
    reply, asked = type(pipeline).reply, []

    def noted(self, conversation, options, **arguments):
        asked.append(options.mode)
        return reply(self, conversation, options, **arguments)

    monkeypatch.setattr(type(pipeline), "reply", noted)
    speeds = measure_speed(pipeline, [item, item, item], ["vanilla", "turbo"], max_new_tokens=120)
    assert asked == ["vanilla", "turbo"] * 3, "the first item warms up, then the modes take turns"
    assert list(speeds) == ["vanilla", "turbo"]
    for speed in speeds.values():
        assert speed["speed_utterances"] == 2
        assert speed["tokens_per_second"] > 0
        assert 0 < speed["first_chunk_seconds"] < 60
        assert speed["first_sound_seconds"] > 0


def test_a_row_holds_every_column_and_the_table_shows_it(pipeline, tiny_world, listener, tmp_path):
    sets = BenchmarkSets(
        *(read_test_set(tiny_world.data_dir / f"{task}.jsonl") for task in ("asr", "tts", "sqa"))
    )
    row = score_row(pipeline, sets, listener, tmp_path / "row", "stage4", "boost")
    scores = "asr_wer tts_wer sqa_s2t_accuracy sqa_s2s_accuracy"
    assert set(scores.split()) <= set(row)
    lines = markdown([row]).splitlines()
    assert lines[2].startswith("| stage4 | boost | 0.0 |")
    for task in ("asr", "tts", "sqa"):
        (line,) = (tmp_path / "row" / f"{task}.jsonl").read_text().splitlines()
        assert json.loads(line)["id"] == f"{task}_1"


def test_a_row_is_outdated_when_weights_or_settings_change(tmp_path):
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "model.safetensors").write_bytes(b"one")
    table = Table(tmp_path, {"limit": 10})
    fingerprint = table.fingerprint(checkpoint)
    table.put({"stage": "s", "mode": "boost", "fingerprint": fingerprint, "asr_wer": 0.1})

    reopened = Table.open(tmp_path, {"limit": 10})
    assert reopened.find("s", "boost", reopened.fingerprint(checkpoint))["asr_wer"] == 0.1
    assert reopened.find("s", "turbo", fingerprint) is None
    assert Table.open(tmp_path, {"limit": 20}).fingerprint(checkpoint) != fingerprint
    (checkpoint / "model.safetensors").write_bytes(b"other")
    assert reopened.find("s", "boost", reopened.fingerprint(checkpoint)) is None
    reopened.put({"stage": "s", "mode": "boost", "fingerprint": "new", "asr_wer": 0.2})
    assert [row["asr_wer"] for row in json.loads((tmp_path / "scores.json").read_text())] == [0.2]


def test_limits_spread_over_the_file(tmp_path):
    sample = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    path = tmp_path / "set.jsonl"
    path.write_text("\n".join(json.dumps({"id": number} | sample) for number in range(10)) + "\n")
    assert [item.id for item in read_test_set(path, limit=5)] == ["0", "2", "4", "6", "8"]
    assert len(read_test_set(path, limit=100)) == 10
    with pytest.raises(ValueError, match="a limit of 0 items"):
        read_test_set(path, limit=0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no samples"),
        ("{broken", r"set\.jsonl:1: not JSON"),
        ('{"messages": []}', r"set\.jsonl:1: 'messages' is missing or empty"),
        ('{"id": 1}', r"set\.jsonl:1: 'messages' is missing or empty"),
        (
            '{"messages": [{"role": "assistant", "content": "x"}]}',
            r"set\.jsonl:1: not a test sample: no message before the assistant's",
        ),
        (
            '{"messages": [{"role": "assistant", "content": "x"}, {"role": "user", "content": "y"}]}',
            r"set\.jsonl:1: .*the last message must be the assistant's",
        ),
        (
            '{"messages": [{"role": "assistant", "content": "x"}], "answers": "eight"}',
            r"set\.jsonl:1: .*'answers' must be a list of texts",
        ),
    ],
)
def test_unusable_test_sets_are_named_with_their_line(tmp_path, text, message):
    (tmp_path / "set.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_test_set(tmp_path / "set.jsonl")


def test_a_missing_test_set_is_named():
    with pytest.raises(ValueError, match=r"nowhere\.jsonl: no such test set"):
        read_test_set(Path("nowhere.jsonl"))
