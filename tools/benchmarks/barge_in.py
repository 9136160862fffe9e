"""Interruptions by speech: how soon the sound stops, and whether the next reply follows from what was heard.

``python tools/benchmark.py barge-in --model_name_or_path DIR … --questions FILE.jsonl --times 50``

One conversation over ``/v1/realtime`` with the server's own detector. While a reply plays, the next question is spoken
in real time, beginning at a random moment. Measured: milliseconds from the moment at which the samples that are speech
have been sent to the ``speech_started`` event, and the pieces of sound that came after it. Then the reply to that
question, made with the session's caches, is compared token by token with that of a fresh session to the same history,
which holds only what was heard. Ends with status 1 unless all are equal and no sound came late.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import random
import threading
import time
from collections.abc import Generator
from dataclasses import replace
from statistics import quantiles
from typing import Any

import websockets
from benchmarks.serve import APPEND_BYTES, RATE, add_questions, read_questions

from vita_audio.cli.arguments import CODEC, RUNTIME, command_parser
from vita_audio.inference import Event, Reply, Request, SpeechPipeline
from vita_audio.provenance import versions
from vita_audio.serving import ServeOptions, Service, create_app
from vita_audio.serving.detection import RATE as DETECTOR_RATE
from vita_audio.serving.detection import WINDOW
from vita_audio.serving.server import Server

SILENCE = bytes(2 * RATE * 6 // 10)
PIECE_SECONDS = APPEND_BYTES / 2 / RATE


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    args = parse(argv)
    questions = read_questions(args.questions, args.limit)
    pipeline = SpeechPipeline.open(args.model_name_or_path, CODEC.read(args), RUNTIME.read(args))
    record = measure(pipeline, questions, args.times, args.seed) | {"versions": versions()}
    print(json.dumps(record))
    if record["equal"] < max(args.times, record["replies"]) or record["late_pieces"]:
        raise ValueError("a reply differs, or sound came after speech was detected")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__, prog="tools/benchmark.py barge-in")
    parser.add_argument("--model_name_or_path", required=True, metavar="DIR", help="checkpoint folder")
    CODEC.add_to(parser)
    RUNTIME.add_to(parser)
    add_questions(parser)
    parser.add_argument("--times", type=int, default=50, metavar="N", help="interruptions")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    return parser.parse_args(argv)


def measure(pipeline: SpeechPipeline, questions: list[bytes], times: int, seed: int) -> dict[str, Any]:
    """Interrupt ``times`` replies."""
    service = Service(pipeline, ServeOptions(port=0), "model")
    replies: list[tuple[Request, list[int]]] = []
    stream = pipeline.backend.stream

    def recording(request: Request) -> Generator[Event, None, None]:
        try:
            yield from stream(request)
        finally:  # an interruption shortens the list afterwards
            replies.append((request, list(request.token_ids or [])))

    pipeline.backend.stream = recording  # type: ignore[method-assign]
    server = Server(create_app(service), service)
    thread = threading.Thread(target=asyncio.run, args=(server.serve(),))
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        replies.clear()
        delays, late = asyncio.run(interrupt(server.address, questions, times, seed))
        equal = sum(is_as_fresh(request, tokens, stream) for request, tokens in replies[1:])
    finally:
        pipeline.backend.stream = stream  # type: ignore[method-assign]
        server.should_exit = True
        thread.join()
    cuts = quantiles(delays, n=100, method="inclusive")
    figures = {"p50": cuts[49], "p95": cuts[94], "max": max(delays)}
    compared = {"replies": len(replies) - 1, "equal": equal}
    return {"interruptions": times, "stopped_after_ms": figures, "late_pieces": late, **compared}


def is_as_fresh(request: Request, tokens: list[int], stream: Any) -> bool:
    """Whether a reply has the tokens that it has without the session's caches."""
    options = replace(request.options, max_new_tokens=max(1, len(tokens)))
    fresh = replace(request, options=options, session=None, token_ids=None, sound="none")
    reply = next(event for event in stream(fresh) if isinstance(event, Reply))
    return tokens == reply.token_ids


async def interrupt(address: str, questions: list[bytes], times: int, seed: int) -> tuple[list[float], int]:
    """Returns the delays in ms, and the number of pieces of sound that came too late."""
    chance = random.Random(seed)
    async with websockets.connect(address.replace("http", "ws", 1) + "/v1/realtime") as socket:
        talk = _Talk(socket)
        await talk.update(temperature=0, max_new_tokens=200)
        listening = asyncio.create_task(talk.listen())
        await talk.say(chance.choice(questions) + SILENCE, in_real_time=False)
        for _ in range(times):
            await talk.speaking.wait()
            await asyncio.sleep(chance.random())
            talk.speaking.clear()
            await talk.say(chance.choice(questions) + SILENCE, in_real_time=True)
        async with asyncio.timeout(60):
            while talk.replies <= times or not talk.done.is_set():
                await asyncio.sleep(0.01)
        listening.cancel()
    return talk.delays[1:], talk.late


class _Talk:
    """The client's side of one conversation."""

    def __init__(self, socket: Any):
        self._socket = socket
        self._sent: list[float] = []  # when each piece was sent
        self._detected = False
        self.speaking, self.done = asyncio.Event(), asyncio.Event()
        self.delays: list[float] = []
        self.replies = self.late = 0

    async def update(self, **session: Any) -> None:
        await self._socket.send(
            json.dumps({"type": "session.update", "session": {"type": "realtime", **session}})
        )

    async def say(self, pcm: bytes, in_real_time: bool) -> None:
        for start in range(0, len(pcm), APPEND_BYTES):
            piece = pcm[start : start + APPEND_BYTES].ljust(APPEND_BYTES, b"\0")
            audio = base64.b64encode(piece).decode()
            await self._socket.send(json.dumps({"type": "input_audio_buffer.append", "audio": audio}))
            self._sent.append(time.perf_counter())
            if in_real_time:
                await asyncio.sleep(PIECE_SECONDS)

    async def listen(self) -> None:
        async for text in self._socket:
            now, event = time.perf_counter(), json.loads(text)
            if event["type"] == "input_audio_buffer.speech_started":
                heard = event["audio_start_ms"] / 1000 + WINDOW / DETECTOR_RATE
                self.delays.append(
                    1000 * (now - self._sent[min(int(heard / PIECE_SECONDS), len(self._sent) - 1)])
                )
                self._detected = True
            elif event["type"] == "response.created":
                self._detected = False
                self.replies += 1
                self.done.clear()
            elif event["type"] == "response.output_audio.delta":
                self.late += self._detected
                self.speaking.set()
            elif event["type"] == "response.done":
                self.speaking.set()  # a reply may be silent
                self.done.set()
            elif event["type"] == "error":
                raise RuntimeError(event["error"]["message"])
