"""A real server on loopback, with the tiny model behind it, and the official client in front."""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx2 as httpx
import openai
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from waiting import eventually

from vita_audio.inference import AudioChunk, SpeechPipeline
from vita_audio.serving import ServeOptions, Service, create_app
from vita_audio.serving.server import Server


@dataclass(frozen=True)
class Serving:
    """A running server."""

    service: Service
    server: Server
    loop: asyncio.AbstractEventLoop

    @property
    def address(self) -> str:
        return self.server.address

    def left(self) -> dict[str, float]:
        """What requests and connections hold, by name, where it is not nothing."""
        text = httpx.get(f"{self.address}/metrics").text
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        figures = {sample.name.removeprefix("vita_audio_"): sample.value for sample in samples}
        held = {name: figures[name] for name in ("sessions", "slots_used", "queue")}
        held |= {"work": not self.service.idle, "rows": self.service.pipeline.backend.engine.num_rows}
        return {name: value for name, value in held.items() if value}

    def assert_nothing_is_left(self) -> None:
        """Of requests and connections that end: no connection, reply or row, after a while."""
        with suppress(AssertionError):
            eventually(lambda: not self.left())
        assert self.left() == {}

    def client(self, key: str = "none", **options) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.address}/v1", api_key=key, max_retries=0, timeout=30, **options)


@contextmanager
def serving(pipeline: SpeechPipeline, keys=(), **options) -> Iterator[Serving]:
    own = SpeechPipeline(
        pipeline.model, pipeline.tokenizer, pipeline.codec
    )  # several servers, an engine for each
    service = Service(own, ServeOptions(port=0, **options), "tiny")
    server = Server(create_app(service, keys), service)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_until_complete, args=(server.serve(),))
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.02)
    try:
        yield Serving(service, server, loop)
    finally:
        server.should_exit = True
        thread.join()
        loop.close()


@pytest.fixture(scope="session")
def pipeline(tiny_world) -> SpeechPipeline:
    return SpeechPipeline.from_pretrained(tiny_world.model_dir, "mel_vq", tiny_world.codec_dir)


@pytest.fixture(scope="session")
def voices_dir(tiny_world, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("voices")
    shutil.copy(tiny_world.audio("reading.wav"), folder / "reader.wav")
    return folder


@pytest.fixture(scope="session")
def running(pipeline, voices_dir) -> Iterator[Serving]:
    with serving(pipeline, voices_dir=voices_dir) as started:
        yield started


@pytest.fixture(scope="session")
def client(running) -> openai.OpenAI:
    return running.client()


@pytest.fixture(scope="session")
def serve():
    """Starts a server with options of its own."""
    return serving


@pytest.fixture
def loud_is_speech(monkeypatch):
    """Loud windows are speech: the tiny model's sounds are no speech that a real detector knows."""
    from vita_audio.serving import detection

    monkeypatch.setattr(
        detection, "load_model", lambda: lambda window, rate: float(window.abs().mean() > 0.02)
    )


@pytest.fixture
def endless(running, monkeypatch) -> None:
    """Spoken replies are their first sound, or silence if they have none, over and over until they are cancelled."""
    stream = running.service.pipeline.backend.stream

    def repeating(request):
        with closing(stream(request)) as events:
            if request.sound != "streamed":
                yield from events
                return
            silence = AudioChunk(torch.zeros(running.service.pipeline.codec.sample_rate // 10), (), 0.0)
            chunks = (event for event in events if isinstance(event, AudioChunk) and len(event.samples))
            sound = next(chunks, silence)
            while True:
                yield sound
                time.sleep(0.1)

    monkeypatch.setattr(running.service.pipeline.backend, "stream", repeating)


@pytest.fixture
def codec_flags(tiny_world) -> list[str]:
    return ["--audio_tokenizer_type", "mel_vq", "--audio_tokenizer_path", str(tiny_world.codec_dir)]
