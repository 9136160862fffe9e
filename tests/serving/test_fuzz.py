"""Mutated requests and websocket frames: each gets a proper answer, the server lives, nothing is left behind.

``FUZZ`` sets the number of requests; 10,000 take some minutes.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from pathlib import Path

import httpx2 as httpx
import websockets

COUNT = int(os.environ.get("FUZZ", "300"))
ODD = [None, True, 0, -1, 2**70, 1.5e308, "", "x" * 5000, "\u0000", "\U0010ffff", [], {}, [[]] * 50, {"": {}}]
ODD += ["../x", "file:///etc/passwd"]
TEXT = {"type": "input_text", "text": "hi"}
PARTS = [
    {"type": "text", "text": "hi"},
    {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}},
]
SPEECH = {
    "model": "tiny",
    "input": "hello",
    "voice": "default",
    "response_format": "wav",
    "max_new_tokens": 4,
}
SEEDS = {
    "/v1/audio/speech": SPEECH,
    "/v1/chat/completions": {
        "model": "tiny", "max_tokens": 4, "modalities": ["text", "audio"], "stream": False,
        "audio": {"voice": "default", "format": "pcm16"},
        "messages": [{"role": "user", "content": PARTS}],
    },
}  # fmt: skip
FRAMES = [
    {"type": "session.update", "session": {"type": "realtime", "audio": {"input": {"turn_detection": None}}}},
    {"type": "input_audio_buffer.append", "audio": "AAAAAAAA"},
    {"type": "input_audio_buffer.commit"},
    {"type": "input_audio_buffer.clear"},
    {"type": "conversation.item.create", "item": {"type": "message", "role": "user", "content": [TEXT]}},
    {"type": "conversation.item.truncate", "item_id": "x", "content_index": 0, "audio_end_ms": 1},
    {"type": "conversation.item.delete", "item_id": "x"},
    {"type": "response.create", "response": {"max_output_tokens": 4}},
    {"type": "response.cancel"},
]  # fmt: skip


def mutated(value, chance: random.Random):
    """The value with something in it replaced, removed or added."""
    if chance.random() < 0.15:
        return chance.choice(ODD)
    if isinstance(value, dict):
        result = {
            name: mutated(each, chance) if chance.random() < 0.4 else each for name, each in value.items()
        }
        if result and chance.random() < 0.15:
            result.pop(chance.choice(list(result)))
        if chance.random() < 0.1:
            result[chance.choice(["x", "mode", "temperature", "seed"])] = chance.choice(ODD)
        return result
    if isinstance(value, list):
        return [mutated(each, chance) for each in value] * chance.choice([1, 1, 1, 0, 3])
    return value


def torn(content: bytes, chance: random.Random) -> bytes:
    """The bytes, sometimes cut or with one of them changed."""
    if content and chance.random() < 0.2:
        place = chance.randrange(len(content))
        return content[:place] + bytes([chance.randrange(256)]) * chance.randrange(2) + content[place + 1 :]
    return content


def test_mutated_requests_get_proper_answers(running):
    chance = random.Random(0)
    before = set(Path.cwd().iterdir())
    with httpx.Client(base_url=running.address, timeout=30) as client:
        for _ in range(COUNT):
            path, body = chance.choice(list(SEEDS.items()))
            content = torn(json.dumps(mutated(body, chance)).encode(), chance)
            response = client.post(path, content=content, headers={"Content-Type": "application/json"})
            assert response.status_code in (200, 400, 404, 500), response.text
            if response.status_code != 200:
                error = response.json()["error"]
                assert error["message"]
                assert response.status_code < 500 or error["code"] == "no_speech", (content, error)
        assert client.get("/health").json() == {"status": "ready"}
    assert set(Path.cwd().iterdir()) == before
    running.assert_nothing_is_left()


def test_mutated_frames_get_proper_answers(running):
    asyncio.run(_send_frames(running.address.replace("http", "ws") + "/v1/realtime"))
    running.assert_nothing_is_left()


async def _send_frames(address: str) -> None:
    chance = random.Random(1)
    sent = 0
    while sent < COUNT:
        async with websockets.connect(address) as socket:
            reading = asyncio.create_task(_read(socket))
            for _ in range(100):
                frame = torn(json.dumps(mutated(chance.choice(FRAMES), chance)).encode(), chance)
                await socket.send(frame if chance.random() < 0.1 else frame.decode("utf-8", "replace"))
                sent += 1
            await socket.send('{"type": "conversation.item.delete", "item_id": "the last one"}')
            async with asyncio.timeout(60):
                await reading


async def _read(socket) -> None:
    """Read until the answer to the last event."""
    async for text in socket:
        event = json.loads(text)
        if event["type"] == "error":
            assert event["error"]["code"] != "internal_error", event
            if "the last one" in event["error"]["message"]:
                return
    raise AssertionError("the server closed the connection")
