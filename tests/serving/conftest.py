"""A real server on loopback, with the tiny model behind it, and the official client in front."""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2 as httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from vita_audio.inference import SpeechPipeline
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

    @property
    def open_connections(self) -> float:
        text = httpx.get(f"{self.address}/metrics").text
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        return next(sample.value for sample in samples if sample.name.endswith("sessions"))

    def assert_nothing_is_left(self) -> None:
        """Of connections that end: no reply, no row, after a while."""
        deadline = time.monotonic() + 20
        while self.open_connections and time.monotonic() < deadline:
            time.sleep(0.01)
        assert self.open_connections == 0
        assert self.service.idle
        assert self.service.pipeline.backend.engine.num_rows == 0

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
def codec_flags(tiny_world) -> list[str]:
    return ["--audio_tokenizer_type", "mel_vq", "--audio_tokenizer_path", str(tiny_world.codec_dir)]
