"""Where turns begin and end, and which samples of them are encoded."""

from __future__ import annotations

import pytest
import torch

from vita_audio.serving import detection
from vita_audio.serving.listening import TAIL, Detection, Listener
from vita_audio.serving.sounds import RATE


class Codec:
    """Its codes are the samples themselves, so that a test can see what was encoded."""

    continuous_input = False

    def encode_stream(self, sample_rate: int):
        assert sample_rate == RATE
        return self

    def push(self, samples, last: bool = False) -> list[float]:
        return samples.tolist()


@pytest.fixture(autouse=True)
def loud_is_speech(monkeypatch):
    monkeypatch.setattr(
        detection, "load_model", lambda: lambda window, rate: float(window.abs().mean() > 0.1)
    )


def sound(*seconds: float) -> torch.Tensor:
    """Silence, speech, silence, …; every sample of speech has a value of its own."""
    pieces = [
        torch.linspace(0.3, 0.6, int(length * RATE)) if index % 2 else torch.zeros(int(length * RATE))
        for index, length in enumerate(seconds)
    ]
    return torch.cat(pieces)


def hear(listener: Listener, samples: torch.Tensor, piece: int = 960) -> list:
    return [heard for part in samples.split(piece) for heard in listener.push(part)]


@pytest.mark.parametrize("piece", [240, 960, 7000])
def test_a_turn_is_encoded_with_its_padding_and_without_the_silence_that_ends_it(piece):
    listener = Listener(Codec(), 60, Detection(prefix_ms=300, silence_ms=500))
    started, stopped = hear(listener, sound(1.0, 1.2, 1.0), piece)
    assert started.started == pytest.approx(1000, abs=35)
    assert stopped.stopped == pytest.approx(2200, abs=35)
    encoded = torch.tensor(stopped.speech.content)
    speech = encoded[encoded > 0]
    assert len(speech) == int(1.2 * RATE)
    before = int((encoded > 0).nonzero()[0])
    assert before == pytest.approx(0.3 * RATE, abs=0.04 * RATE)
    assert len(encoded) - before - len(speech) == pytest.approx(TAIL, abs=0.04 * RATE)


def test_a_pause_inside_a_turn_is_encoded():
    listener = Listener(Codec(), 60, Detection(silence_ms=500))
    news = hear(listener, sound(0.5, 0.5, 0.3, 0.5, 1.0))
    assert [heard.speech is not None for heard in news] == [False, True]
    assert news[1].speech.seconds == pytest.approx(0.3 + 1.3 + TAIL / RATE, abs=0.05)


def test_two_turns_are_two():
    listener = Listener(Codec(), 60, Detection())
    news = hear(listener, sound(0.5, 0.5, 1.0, 0.4, 1.0))
    assert [heard.started is not None for heard in news] == [True, False, True, False]
    assert news[3].speech.seconds < 0.4 + 0.3 + 0.2


def test_a_turn_ends_at_the_longest_length_and_memory_does_not_grow():
    listener = Listener(Codec(), 1.0, Detection())
    news = hear(listener, sound(0.2, 30.0, 1.0))
    turns = [heard for heard in news if heard.speech is not None]
    assert len(turns) == 1
    assert turns[0].speech.seconds == pytest.approx(1.0, abs=0.05)
    assert len(listener._waiting) < RATE


def test_what_is_cleared_is_not_in_the_turn():
    listener = Listener(Codec(), 60, None)
    listener.push(torch.ones(100))
    listener.clear()
    assert listener.commit() is None
    listener.push(torch.full((50,), 0.5))
    assert listener.commit().content == [0.5] * 50
    assert listener.commit() is None
