"""Many talkers for a while, some of whom leave or send nonsense: nobody else notices, and nothing is left behind.

``SOAK_SECONDS`` sets how long; the memory is compared only in runs of five minutes and more.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import random
import threading
import time

import psutil
import pytest
import websockets

from vita_audio.audio import load_audio
from vita_audio.serving.sounds import RATE, to_pcm

SECONDS = float(os.environ.get("SOAK_SECONDS", "20"))
TALKERS = 8
SETTLED_SECONDS = 120
MOST_GROWTH_MB = 20
NONSENSE = ["", "{", "[]", '{"type": "x"}', '{"type": "input_audio_buffer.append", "audio": 1}', "\u0000"]


@pytest.mark.slow
def test_a_crowd_leaves_nothing_behind(running, tiny_world):
    question = to_pcm(load_audio(tiny_world.audio("question.wav"), RATE)[0])
    process = psutil.Process()
    address = running.address.replace("http", "ws") + "/v1/realtime"
    asyncio.run(crowd(address, question, 3.0))  # what is made once is made
    wait_until_idle(running)
    threads, files = threading.active_count(), process.num_fds()
    answers, memory = asyncio.run(crowd(address, question, SECONDS))
    wait_until_idle(running)
    assert answers > SECONDS
    assert threading.active_count() <= threads + TALKERS  # threads of pools are made when they are needed
    assert process.num_fds() <= files + 2
    assert running.service.pipeline.backend.engine.num_rows == 0
    if SECONDS >= 300:
        assert memory[-1] - memory[SETTLED_SECONDS] < MOST_GROWTH_MB, memory[:: len(memory) // 20]


def wait_until_idle(running) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        sessions = running.service.metrics.registry.get_sample_value("vita_audio_sessions")
        if running.service.idle and not sessions:
            return
        time.sleep(0.05)
    raise AssertionError("a slot or a connection was not freed")


async def crowd(address: str, question: bytes, seconds: float) -> tuple[int, list[float]]:
    """Let talkers ask for some time. Returns the number of answers, and the memory in MB at each second."""
    ends = time.monotonic() + seconds
    memory: list[float] = []
    watch = asyncio.create_task(watch_memory(memory))
    talkers = [talk(address, question, ends, random.Random(seed)) for seed in range(TALKERS)]
    answers = sum(await asyncio.gather(*talkers))
    watch.cancel()
    return answers, memory


async def watch_memory(memory: list[float]) -> None:
    while True:
        memory.append(psutil.Process().memory_info().rss / 1e6)
        await asyncio.sleep(1)


async def talk(address: str, question: bytes, ends: float, chance: random.Random) -> int:
    """Ask on one connection after the other. Every answer that is waited for must be complete."""
    answers = 0
    while time.monotonic() < ends:
        leaves = chance.random() < 0.2
        async with websockets.connect(address) as socket:
            if chance.random() < 0.3:
                await socket.send(chance.choice(NONSENSE))
            vad = {"type": "realtime", "temperature": 0, "audio": {"input": {"turn_detection": None}}}
            await socket.send(json.dumps({"type": "session.update", "session": vad}))
            for _ in range(chance.randint(1, 3)):
                audio = base64.b64encode(question).decode()
                await socket.send(json.dumps({"type": "input_audio_buffer.append", "audio": audio}))
                await socket.send('{"type": "input_audio_buffer.commit"}')
                await socket.send('{"type": "response.create"}')
                if leaves:
                    await asyncio.sleep(chance.random() * 0.2)
                    break
                assert await status_of(socket) == "completed"
                answers += 1
    return answers


async def status_of(socket) -> str:
    """How the next reply ends."""
    async with asyncio.timeout(60):
        async for text in socket:
            event = json.loads(text)
            if event["type"] == "response.done":
                return event["response"]["status"]
    raise AssertionError("the server closed the connection")
