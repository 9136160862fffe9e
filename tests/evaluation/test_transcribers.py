"""Recognisers behind one interface, alone and in several processes."""

from __future__ import annotations

import random
import runpy
from pathlib import Path

import pytest
import torch

from vita_audio.audio import save_audio
from vita_audio.evaluation.transcribers import PocketSphinxTranscriber, TranscriberConfig, TranscriberPool

GRAMMAR = "#JSGF V1.0;\ngrammar digits;\npublic <digits> = ( zero | one | two | three | four )+;\n"


@pytest.fixture
def grammar(tmp_path):
    path = tmp_path / "digits.gram"
    path.write_text(GRAMMAR)
    return str(path)


@pytest.fixture(scope="module")
def clips() -> list[tuple[torch.Tensor, int]]:
    """Spoken digits, some of them in noise."""
    folder = next((Path(__file__).parents[2] / "tools").rglob("espeak.py"))
    espeak = runpy.run_path(str(folder), run_name="espeak")
    try:
        synthesiser = espeak["open_synthesiser"]()
    except RuntimeError as error:
        pytest.skip(str(error))
    made = []
    for number in range(8):
        generator = torch.Generator().manual_seed(number)
        digits = torch.randint(5, (4,), generator=generator).tolist()
        text = " ".join("zero one two three four".split()[digit] for digit in digits)
        voice = espeak["Voice"](("en-us+f2", "en-us+m3", "en-us", "en-us+klatt3")[number % 4])
        speech = torch.as_tensor(synthesiser.speak(text, voice))
        noise = (0.0, 0.05)[number % 2] * torch.randn(len(speech), generator=generator)
        made.append(((0.5 * speech / speech.abs().max() + noise).clamp(-1, 1), synthesiser.sample_rate))
    return made


def test_a_grammar_restricts_the_transcript(grammar, clips):
    words = " ".join(PocketSphinxTranscriber(grammar).transcribe(*clip) for clip in clips[:2])
    assert words.strip()
    assert set(words.split()) <= {"zero", "one", "two", "three", "four"}


def test_a_transcript_does_not_depend_on_earlier_clips(grammar, clips):
    """Likelihoods are compared too: they show what words alone rarely do."""

    def hear(transcriber: PocketSphinxTranscriber, clip: tuple[torch.Tensor, int]) -> tuple[str, float]:
        words = transcriber.transcribe(*clip)
        return words, transcriber._decoder.hyp().score

    alone = [hear(PocketSphinxTranscriber(grammar), clip) for clip in clips]
    assert sum(bool(words) for words, _ in alone) == len(clips)
    used = PocketSphinxTranscriber(grammar)
    for seed in range(2):
        order = random.Random(seed).sample(range(len(clips)), len(clips))
        assert [hear(used, clips[index]) for index in order] == [alone[index] for index in order]


def test_several_processes_give_the_transcripts_of_one_in_order(grammar, clips, tmp_path):
    files = []
    for number, (speech, rate) in enumerate(clips[:4]):
        files.append(str(tmp_path / f"{number}.wav"))
        save_audio(files[-1], speech, rate)
    config = TranscriberConfig(grammar=grammar)
    with TranscriberPool(config, processes=0) as alone, TranscriberPool(config, processes=2) as pool:
        assert list(pool.transcribe(files)) == list(alone.transcribe(files))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TranscriberConfig(name="ears"), "unknown transcriber 'ears'"),
        (TranscriberConfig(grammar="nowhere.gram"), "nowhere.gram: no such grammar file"),
        (TranscriberConfig(name="paraformer"), "pip install funasr"),
    ],
)
def test_a_recogniser_that_cannot_be_opened_is_named(config, message):
    with pytest.raises(ValueError, match=message):
        config.open()


def test_a_grammar_with_unknown_words_is_refused(tmp_path):
    path = tmp_path / "bad.gram"
    path.write_text(GRAMMAR.replace("zero", "zzyzzk"))
    with pytest.raises(ValueError, match=r"bad\.gram"):
        PocketSphinxTranscriber(path)


def test_a_worker_reports_why_it_cannot_open(tmp_path):
    save_audio(tmp_path / "a.wav", torch.zeros(16_000), 16_000)
    with TranscriberPool(TranscriberConfig(grammar="nowhere.gram"), processes=1) as pool:
        future = pool.submit(str(tmp_path / "a.wav"))
        with pytest.raises(ValueError, match=r"nowhere\.gram"):
            future.result(timeout=120)
