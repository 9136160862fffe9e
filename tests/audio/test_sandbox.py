"""Untrusted clips are decoded in another process, and nothing of them harms this one."""

from __future__ import annotations

import io
import signal
import socket
import threading
from multiprocessing.connection import Connection

import numpy as np
import pytest
import soundfile
import torch

from vita_audio.audio import AudioError, load_audio, sandbox
from vita_audio.audio.sandbox import ClipProcess


def clip(seconds: float, container: str = "WAV") -> bytes:
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, int(8000 * seconds))
    content = io.BytesIO()
    soundfile.write(content, noise, 8000, format=container)
    return content.getvalue()


@pytest.fixture(scope="module")
def process():
    started = ClipProcess(longest_seconds=2)
    yield started
    started.close()
    started.close()


@pytest.mark.parametrize("container", ["WAV", "FLAC", "OGG"])
def test_a_clip_is_what_load_audio_makes_of_it(process, container):
    waveform, rate = process.decode(clip(0.5, container))
    expected, own_rate = load_audio(clip(0.5, container))
    assert rate == own_rate
    assert torch.equal(waveform, expected)


@pytest.mark.parametrize(
    ("content", "said"), [(b"no sound", "not a readable"), (b"", "empty"), (clip(3), "3.0 s")]
)
def test_a_clip_that_cannot_be_used_is_refused_in_one_line(process, content, said):
    with pytest.raises(AudioError, match=said) as refused:
        process.decode(content)
    assert "\n" not in str(refused.value)
    process.decode(clip(0.1))


def test_a_clip_that_takes_too_long_is_refused_and_the_next_one_is_decoded(process):
    process.start()
    process._process.send_signal(signal.SIGSTOP)
    process._timeout, timeout = 0.2, process._timeout
    try:
        with pytest.raises(AudioError, match="takes too long"):
            process.decode(clip(1.9))
    finally:
        process._timeout = timeout
    assert process.decode(clip(0.1))[1] == 8000


def test_a_process_that_dies_with_a_clip_is_replaced(process):
    process.start()
    threading.Timer(0.3, process._process.kill).start()
    process._process.send_signal(signal.SIGSTOP)  # it does not read the clip
    with pytest.raises(AudioError, match="stops the decoder"):
        process.decode(clip(1.0))
    assert process.decode(clip(0.1))[1] == 8000


def test_the_process_answers_each_clip_until_its_pipe_ends(monkeypatch):
    """The same program in a thread, where a limit on memory would be ours."""
    limits = []
    monkeypatch.setattr(sandbox.resource, "setrlimit", lambda kind, limit: limits.append(limit))
    ours, theirs = socket.socketpair()
    program = threading.Thread(target=sandbox.main, args=([str(theirs.detach()), "2"],))
    program.start()
    pipe = Connection(ours.detach())
    assert pipe.recv_bytes() == b"r"
    for content, answer in ((clip(0.1), b"s"), (b"no sound", b"e"), (clip(3), b"e")):
        pipe.send_bytes(content)
        assert pipe.recv_bytes()[:1] == answer
    monkeypatch.setattr(sandbox, "load_audio", lambda encoded: (_ for _ in ()).throw(MemoryError))
    pipe.send_bytes(clip(0.1))
    assert pipe.recv_bytes() == b"eaudio bytes: the clip needs too much memory"
    pipe.close()
    program.join(10)
    assert not program.is_alive()
    assert all(limit[0] > sandbox.MEMORY_BYTES for limit in limits)
