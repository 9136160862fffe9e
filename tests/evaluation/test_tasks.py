"""Test sets, tasks and their scores, on a tiny model that knows its three samples by heart."""

from __future__ import annotations

import json
import os
import unicodedata
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from vita_audio.audio import save_audio
from vita_audio.evaluation.bench import Bench
from vita_audio.evaluation.items import file_name, read_test_set
from vita_audio.evaluation.journal import Utterance
from vita_audio.evaluation.listening import Listener
from vita_audio.evaluation.speed import measure_speed, speed_scores
from vita_audio.evaluation.tasks import (
    SPEECH_QA,
    TEXT_QA,
    SeedTTS,
    SpeechRecognition,
    SpeechSynthesis,
    run_recordings,
)
from vita_audio.evaluation.transcribers import TranscriberConfig, TranscriberPool
from vita_audio.inference import GenerationOptions, SpeechPipeline, Timings

OPTIONS = GenerationOptions.greedy("boost", max_new_tokens=120)
ASR, TTS = SpeechRecognition(), SpeechSynthesis()


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
def bench(pipeline, pool, tmp_path) -> Bench:
    return Bench(pipeline, tmp_path, "set", Listener(pipeline.codec, pool), OPTIONS)


class Ears:
    """Returns given transcripts."""

    def __init__(self, words):
        self.words = words

    def submit(self, audio: str) -> Future[str]:
        future: Future[str] = Future()
        future.set_result(self.words(audio))
        return future


@pytest.fixture
def requests_made(pipeline, monkeypatch) -> list:
    made, stream_many = [], pipeline.backend.stream_many

    def note(requests):
        made.extend(requests)
        return stream_many(requests)

    monkeypatch.setattr(pipeline.backend, "stream_many", note)
    return made


# -- tasks -----------------------------------------------------------------------------------------------


def test_asr_compares_the_text_with_the_reference(bench, tiny_world):
    items = ASR.read(tiny_world.data_dir / "asr.jsonl")
    utterances = ASR.run(bench, items)
    assert utterances == [Utterance("asr_1", "the blue key", "the blue key")]
    assert ASR.score(utterances)["asr_wer"] == 0.0
    wrong = [Utterance("1", "the blue key", "the key"), Utterance("2", "a", "")]
    assert ASR.score(wrong)["asr_wer"] == 2 / 4


def test_characters_and_words_are_counted_apart():
    scores = ASR.score([Utterance("1", "the blue key", "the blue kex")])
    assert (scores["asr_wer"], scores["asr_cer"]) == (1 / 3, 1 / 10)


def test_the_length_limit_of_recognition_does_not_depend_on_the_reference(bench, tiny_world, requests_made):
    (item,) = ASR.read(tiny_world.data_dir / "asr.jsonl")
    for answer in ("a", "a very long reference " * 50):
        ASR.run(bench, [replace(item, answer=answer)])
    limits = [request.options.max_new_tokens for request in requests_made]
    assert limits == [len(bench.pipeline.prompt(item.conversation)) + 32] * 2


def test_spoken_replies_may_have_1024_tokens(bench, tiny_world, requests_made):
    items = TTS.read(tiny_world.data_dir / "tts.jsonl")
    TTS.run(replace(bench, options=GenerationOptions.greedy("boost")), items)
    assert [request.options.max_new_tokens for request in requests_made] == [1024]


def test_tts_writes_what_it_says_and_has_it_heard(bench, tiny_world, tmp_path):
    items = TTS.read(tiny_world.data_dir / "tts.jsonl")
    (utterance,) = TTS.run(bench, items)
    assert (utterance.reference, utterance.text) == ("the quiet river runs", "the quiet river runs")
    assert (tmp_path / utterance.wav).stat().st_size > 16_000
    assert set(utterance.heard.split()) <= {"river", "blue", "quiet"}
    floor, natural = run_recordings(bench, bench.pipeline.codec, items)
    assert floor[0].heard == utterance.heard  # it reads with the very codes of the recording
    assert TTS.score([utterance])["tts_wer"] == TTS.score_recordings(floor, natural)["tts_floor_wer"]


def test_natural_and_resynthesised_speech_have_their_own_scores(bench, tiny_world, tmp_path):
    items = TTS.read(tiny_world.data_dir / "tts.jsonl")
    ears = Ears(lambda audio: "the quiet river runs" if "reading" in audio else "the quiet")
    listener = Listener(bench.pipeline.codec, ears)
    floor, natural = run_recordings(replace(bench, listener=listener), bench.pipeline.codec, items)
    assert natural[0].wav == tiny_world.audio("reading.wav")
    assert TTS.score_recordings(floor, natural) == {"tts_floor_wer": 0.5, "tts_natural_wer": 0.0}


def test_the_same_codes_are_recognised_once(pipeline, tmp_path):
    submitted = []
    ears = Ears(lambda audio: submitted.append(audio) or f"{len(submitted)}")
    listener = Listener(pipeline.codec, ears)
    first, second = (listener.hear([1, 2, 3], tmp_path / name) for name in ("a.wav", "b.wav"))
    other = listener.hear([3, 2, 1], tmp_path / "c.wav")
    assert first == second != other
    assert len(submitted) == 2
    assert (tmp_path / "a.wav").read_bytes() == (tmp_path / "b.wav").read_bytes()


def test_speech_qa_scores_text_and_speech(bench, tiny_world, tmp_path):
    items = SPEECH_QA.read(tiny_world.data_dir / "sqa.jsonl")
    (utterance,) = SPEECH_QA.run(bench, items)
    assert utterance.reference == ["blue"]
    assert SPEECH_QA.score([utterance])["sqa_s2t_accuracy"] == 1.0
    assert (tmp_path / utterance.wav).is_file()


def test_typed_questions_are_scored_on_text_and_on_speech():
    utterances = [
        Utterance("1", ["five"], "it is five", heard="it is nine", wav="1.wav"),
        Utterance("2", ["six"], "it is two", heard="it is six", wav="2.wav"),
        Utterance("3", ["six"], "it is six"),
    ]
    scores = TEXT_QA.score(utterances)
    assert scores["text_qa_t2t_accuracy"] == pytest.approx(2 / 3)
    assert scores["text_qa_t2s_accuracy"] == pytest.approx(1 / 3)
    assert scores["text_qa_without_audio"] == 1


def test_questions_without_a_system_message_get_the_one_that_is_given(bench, tiny_world, requests_made):
    items = SPEECH_QA.read(tiny_world.data_dir / "sqa.jsonl")
    for system in (None, "Be brief."):
        SPEECH_QA.run(replace(bench, system=system), items)
    without, with_message = (bench.pipeline.tokenizer.decode(r.prompt.input_ids) for r in requests_made)
    assert without.startswith("<|im_start|>user")
    assert with_message.startswith("<|im_start|>system\nBe brief.<|im_end|>")


def test_replies_without_speech_stay_in_the_denominator():
    spoken = Utterance("1", ["eight"], "eight", heard="eighteen", wav="1.wav")
    silent = Utterance("2", ["two"], "two")
    scores = SPEECH_QA.score([spoken, silent])
    assert (scores["sqa_s2t_accuracy"], scores["sqa_s2s_accuracy"]) == (1.0, 0.5)
    assert (scores["sqa_s2t_accuracy_whole_words"], scores["sqa_s2s_accuracy_whole_words"]) == (1.0, 0.0)
    assert scores["sqa_without_audio"] == 1
    assert scores["sqa_s2s_accuracy_answered"] == 1.0, "as published, those without speech left out"
    wrong = Utterance("3", ["two"], "two", heard="three", wav="3.wav")
    assert SPEECH_QA.score([spoken, silent, wrong])["sqa_s2s_accuracy_answered"] == 0.5

    scores = TTS.score([Utterance("1", "a b", "", heard="a b"), Utterance("2", "c d", "")])
    assert (scores["tts_wer"], scores["tts_wer_answered"], scores["tts_without_audio"]) == (0.5, 0.0, 1)
    seed_tts = SeedTTS("en").score([Utterance("1", "a", "", "a"), Utterance("2", "b", "")])
    assert seed_tts["seed_tts_wer"] == 0.5


def test_seed_tts_divides_by_the_words_of_the_reference():
    assert SeedTTS("en").score([Utterance("1", "a b c d", "", heard="a")])["seed_tts_wer"] == 3 / 4


def test_punctuation_does_not_count_as_words():
    assert (
        TTS.score([Utterance("1", "Well-known, isn't it?", "", heard="well known isn t it")])["tts_wer"] == 0
    )


def test_the_libritts_normaliser_spells_out_what_the_recogniser_abbreviates():
    pytest.importorskip("tn.english.normalizer", reason="WeTextProcessing is an extra")
    spelled = Utterance("1", "Doctor Smith paid three dollars.", "", heard="Dr. Smith paid $3.")
    assert SpeechSynthesis("libritts").score([spelled])["tts_wer"] == 0
    assert SpeechSynthesis("words").score([spelled])["tts_wer"] > 0.3


def test_whispers_normaliser_makes_spellings_alike_and_leaves_the_published_columns():
    said = Utterance("1", "Mister Smith paid $21 in colour", "Mr. Smith paid twenty-one dollars in color")
    scores = SpeechRecognition("whisper").score([said])
    assert scores["asr_wer_words"] == 0
    assert scores["asr_wer"] == ASR.score([said])["asr_wer"] > 0.5
    accented = Utterance("1", "Ça va? [bruit]", "ça va")
    assert SpeechRecognition("whisper-basic").score([accented])["asr_wer_words"] == 0


def test_strict_and_published_error_rates_stand_side_by_side():
    said = [
        Utterance("1", "the sea is well-known", "the sea, is well known"),
        Utterance("2", "你好", "你好。"),
    ]
    scores = ASR.score(said)
    assert scores["asr_wer"] == 3 / 6, "sea, is another word than sea, and a hyphen joins"
    assert scores["asr_wer_words"] == 0
    spoken = [replace(one, heard=one.text, text="") for one in said[:1]]
    seed_tts = SeedTTS("en").score([*spoken, Utterance("3", "silence", "")])
    assert seed_tts["seed_tts_wer_answered"] == 2 / 4
    assert seed_tts["seed_tts_wer"] == (2 / 4 + 1) / 2
    assert seed_tts["seed_tts_wer_words"] == 1 / 6


def test_the_similarity_of_voices_is_averaged_over_those_that_speak():
    said = [
        Utterance("1", "a", "", heard="a", similarity=0.5),
        Utterance("2", "b", "", heard="b", similarity=0.75),
    ]
    assert SeedTTS("en").score([*said, Utterance("3", "c", "")])["seed_tts_similarity"] == 0.625
    assert TTS.score(said)["tts_similarity"] == 0.625


@pytest.mark.parametrize("task", [ASR, TTS, SPEECH_QA, TEXT_QA, SeedTTS("en")], ids=lambda task: task.name)
def test_no_utterances_have_no_score(task):
    with pytest.raises(ValueError, match="nothing to score"):
        task.score([])


def test_both_sides_are_composed_before_they_are_compared():
    composed, decomposed = (unicodedata.normalize(form, "un café noir") for form in ("NFC", "NFD"))
    for reference, said in ((composed, decomposed), (decomposed, composed)):
        assert ASR.score([Utterance("1", reference, said)])["asr_wer"] == 0
        assert TTS.score([Utterance("1", reference, "", heard=said)])["tts_wer"] == 0
        assert SeedTTS("en").score([Utterance("1", reference, "", heard=said)])["seed_tts_wer"] == 0
        qa = SPEECH_QA.score([Utterance("1", [reference], said, heard=said)])
        assert [qa[key] for key in qa if key.endswith(("accuracy", "words"))] == [1.0] * 4


def test_each_item_draws_from_its_own_seed_in_every_batch(bench, tiny_world, requests_made):
    (item,) = TTS.read(tiny_world.data_dir / "tts.jsonl")
    items = [replace(item, id=str(number)) for number in range(3)]
    drawn = replace(OPTIONS, do_sample=True, temperature=5.0, seed=7)
    said = []
    for batch_size in (1, 3):
        listener = Listener(bench.pipeline.codec, Ears(lambda audio: ""))
        asked = replace(bench, options=drawn, batch_size=batch_size, listener=listener)
        said.append([utterance.text for utterance in TTS.run(asked, items)])
    assert sorted(request.options.seed for request in requests_made[:3]) == [7, 8, 9]
    assert said[0] == said[1]


# -- speed -----------------------------------------------------------------------------------------------


def test_speed_is_measured_on_single_replies_with_modes_in_turn(pipeline, tiny_world, monkeypatch):
    (item,) = TTS.read(tiny_world.data_dir / "tts.jsonl")
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


def test_the_first_chunk_is_timed_from_the_finished_prompt_and_the_first_sound_from_the_question():
    timings = [
        Timings(prompt=1.0, first_token=1.5, first_chunk=chunk, first_sound=9.0, generated=3.0, total=9, new_tokens=40)
        for chunk in (1.75, 2.0, None)
    ]  # fmt: skip
    assert speed_scores(timings, [4.0, 5.0, None]) == {
        "tokens_per_second": 20.0,
        "first_chunk_seconds": 0.875,
        "first_sound_seconds": 4.5,
        "speed_utterances": 3,
    }


# -- test sets -------------------------------------------------------------------------------------------


def test_limits_spread_over_the_file(tmp_path, text_sample, write_lines):
    path = write_lines(
        tmp_path / "set.jsonl", [{"id": number} | text_sample("q", "a") for number in range(10)]
    )
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


def question(answer: object, **more: object) -> dict:
    return {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}], **more}


def test_a_list_as_the_last_content_is_a_list_of_answers(tmp_path, write_lines):
    path = write_lines(tmp_path / "set.jsonl", [question(["New York", "NYC"]), question("Rome")])
    first, second = TEXT_QA.read(path)
    assert (first.answers, second.answers) == (("New York", "NYC"), ("Rome",))
    assert TEXT_QA.score([Utterance("1", list(first.answers), "it is NYC")])["text_qa_t2t_accuracy"] == 1
    with pytest.raises(ValueError, match="content of message 1 must be text, it is of type list"):
        ASR.read(path)


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (question(None), r"content of message 1 must be text, it is missing"),
        (question({"text": "a"}), r"content of message 1 must be text, it is of type dict"),
        (question([]), r"the last message lists no answers"),
        (question([1, 2]), r"'answers' must be a list of texts"),
        (question("?"), r"the answer '\?' contains no words"),
        (question("right", answers=["yes", "…"]), r"the answer '…' contains no words"),
        (question(["yes", "!"]), r"the answer '!' contains no words"),
    ],
)
def test_answers_that_cannot_be_scored_are_refused(tmp_path, write_lines, sample, message):
    path = write_lines(tmp_path / "set.jsonl", [question("fine"), sample])
    with pytest.raises(ValueError, match=rf"set\.jsonl:2: .*{message}"):
        TEXT_QA.read(path)


def test_spoken_and_typed_questions_are_not_mixed_up(tmp_path, tiny_world, write_lines):
    with pytest.raises(ValueError, match="the last question must be spoken"):
        SPEECH_QA.read(write_lines(tmp_path / "set.jsonl", [question("a")]))
    with pytest.raises(ValueError, match="the last question must be typed"):
        TEXT_QA.read(tiny_world.data_dir / "sqa.jsonl")


def test_references_without_words_are_refused(tmp_path, tiny_world, write_lines):
    asr, tts = (json.loads(json.dumps(tiny_world.samples[task])) for task in ("asr", "tts"))
    for mark in ("。", "...", "\u200b"):
        asr["messages"][-1]["content"] = mark
        with pytest.raises(ValueError, match=r"set\.jsonl:1: .*the reference .* contains no words"):
            ASR.read(write_lines(tmp_path / "set.jsonl", [asr]), tiny_world.data_dir)
    asr["messages"][-1]["content"] = "。"
    tts["messages"][0]["content"] = "Convert the text to speech.\n…"
    with pytest.raises(ValueError, match=r"set\.jsonl:1: .*the reference '。' contains no words"):
        ASR.read(write_lines(tmp_path / "set.jsonl", [asr]), tiny_world.data_dir)
    with pytest.raises(ValueError, match=r"set\.jsonl:1: .*the text to be read, '…', contains no words"):
        TTS.read(write_lines(tmp_path / "set.jsonl", [tts]), tiny_world.data_dir)


def test_a_missing_recording_is_named_before_a_model_is_loaded(tmp_path, tiny_world, write_lines):
    path = write_lines(tmp_path / "set.jsonl", [tiny_world.samples["asr"]])
    with pytest.raises(ValueError, match=r"set\.jsonl:1: .*question\.wav: no such audio file"):
        ASR.read(path)


@pytest.mark.parametrize("size", [0, -1])
def test_a_batch_that_answers_nothing_is_refused(bench, size):
    with pytest.raises(ValueError, match="batch size"):
        replace(bench, batch_size=size)


# -- Seed-TTS --------------------------------------------------------------------------------------------


@pytest.fixture
def meta(tmp_path) -> Path:
    folder = tmp_path / "en"
    (folder / "prompt-wavs").mkdir(parents=True)
    for name in ("prompt-wavs/one.wav", "said.wav"):
        save_audio(folder / name, 0.1 * torch.randn(8_000), 16_000)
    (folder / "meta.lst").write_text(
        "utt-1|who speaks|prompt-wavs/one.wav|Read this.\nutt-2|who|prompt-wavs/one.wav|And this.|said.wav\n"
    )
    return folder / "meta.lst"


def test_a_seed_tts_list_is_read_with_and_without_the_speaker(meta):
    first, second = SeedTTS("en").read(meta)
    assert [message.content for message in first.conversation.messages] == [
        "Convert the text to speech.\nRead this."
    ]
    assert (first.reference_audio, second.reference_audio) == (None, str(meta.parent / "said.wav"))
    spoken, _ = SeedTTS("en", speaker_prompt=True).read(meta)
    assert spoken.conversation.messages[0].content == "Your Voice: <|audio|>\n"
    assert spoken.conversation.audios == (str(meta.parent / "prompt-wavs" / "one.wav"),)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("utt|a|b.wav", "3 fields"),
        ("utt|a|b.wav|one | two|said.wav|x", "7 fields"),
        ("|a|prompt-wavs/one.wav|text", "the utterance's name, is empty"),
        ("utt|a|nowhere.wav|text", r"nowhere\.wav: no such audio file"),
        ("utt|a|prompt-wavs/one.wav|...", "contains no words"),
        ("utt-1|a|prompt-wavs/one.wav|text", "id 'utt-1' occurs twice"),
    ],
)
def test_a_bad_line_of_a_seed_tts_list_is_named(meta, line, message):
    with meta.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=message):
        SeedTTS("en", speaker_prompt=True).read(meta)


# -- file names ------------------------------------------------------------------------------------------

ANY_ID = st.text(st.characters(codec=None), min_size=1, max_size=300)


@given(st.lists(ANY_ID, unique=True, max_size=6))
@example(
    [
        "a?",
        "a!",
        "a/b",
        "a_b",
        "A_b",
        "a_",
        "a_-1f2e3d4c5b6a7988",
        "x" * 300,
        "x" * 301,
        "é",
        "e\u0301",
        "..",
        ".",
    ]
)
def test_no_two_ids_share_a_file(ids):
    names = [file_name(identifier) for identifier in ids]
    assert len({unicodedata.normalize("NFC", name).casefold() for name in names}) == len(ids)
    for name in names:
        assert len(os.fsencode(f"{name}.wav")) <= 100
        assert not set(name) & set('/\\:*?"<>|\0')
        assert not name.startswith(".")


def test_plain_ids_are_their_own_name():
    assert file_name("tts_test_0") == "tts_test_0"


def test_ids_that_differ_in_punctuation_only_are_scored_on_their_own_sound(bench, tiny_world):
    (item,) = TTS.read(tiny_world.data_dir / "tts.jsonl")
    ids = ["a?", "a!", "a:", "A?", "é", "e\u0301", "x" * 400]
    utterances = TTS.run(bench, [replace(item, id=identifier) for identifier in ids])
    assert len({utterance.wav for utterance in utterances}) == len(ids)
    assert all((bench.folder / utterance.wav).is_file() for utterance in utterances)
