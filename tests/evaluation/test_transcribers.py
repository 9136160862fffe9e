"""Recognisers behind one interface, alone and in several processes."""

from __future__ import annotations

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


def babble(seed: int, rate: int = 16_000) -> torch.Tensor:
    """Noise bursts that a grammar bends into words."""
    generator = torch.Generator().manual_seed(seed)
    envelope = torch.sin(torch.arange(rate) / rate * 12).clamp(min=0)
    return 0.3 * envelope * torch.randn(rate, generator=generator)


def test_a_grammar_bounds_what_is_heard(grammar):
    words = " ".join(PocketSphinxTranscriber(grammar).transcribe(babble(seed), 16_000) for seed in range(4))
    assert words
    assert set(words.split()) <= {"zero", "one", "two", "three", "four"}


def test_what_came_before_changes_nothing(grammar):
    fresh, used = PocketSphinxTranscriber(grammar), PocketSphinxTranscriber(grammar)
    for seed in range(1, 5):
        used.transcribe(20 * babble(seed), 16_000)
    assert used.transcribe(babble(0), 16_000) == fresh.transcribe(babble(0), 16_000)


def test_processes_hear_what_one_hears_and_in_order(grammar, tmp_path):
    files = []
    for seed in range(4):
        files.append(str(tmp_path / f"{seed}.wav"))
        save_audio(files[-1], babble(seed, 22_050), 22_050)
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
def test_what_cannot_be_opened_is_named(config, message):
    with pytest.raises(ValueError, match=message):
        config.open()


def test_a_grammar_with_unknown_words_is_refused(tmp_path):
    path = tmp_path / "bad.gram"
    path.write_text(GRAMMAR.replace("zero", "zzyzzk"))
    with pytest.raises(ValueError, match=r"bad\.gram"):
        PocketSphinxTranscriber(path)


def test_a_worker_says_why_it_cannot_listen(tmp_path):
    save_audio(tmp_path / "a.wav", babble(0), 16_000)
    with TranscriberPool(TranscriberConfig(grammar="nowhere.gram"), processes=1) as pool:
        future = pool.submit(str(tmp_path / "a.wav"))
        with pytest.raises(ValueError, match=r"nowhere\.gram"):
            future.result(timeout=120)
