"""A crowd on a running server for a while: nobody's honest request fails, and the server keeps nothing afterwards.

``python tools/benchmark.py soak --url http://127.0.0.1:8000 --questions FILE.jsonl --seconds 1200 --png soak.png``

Each talker asks spoken questions, over ``/v1/realtime`` in turns on one connection or over HTTP, one after the other
with pauses. A fifth of the visits end within two seconds, in the middle of what happens then. Malformed frames and
bodies are mixed in. The server's ``/metrics`` tell its memory, threads, files, slots and connections, once a second;
seconds in which this program was stopped do not count.

It ends with status 1 unless every honest request was answered, every malformed one was refused, no slot or connection
is left, threads and files are as many as after the first few seconds, and memory has grown by less than
``--most_growth_mb`` since the first two minutes. The last line is the figures as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import logging
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request as Body
from urllib.request import urlopen

import websockets
from benchmarks.serve import RATE, add_questions, add_server, ask_on, read_metrics, read_questions, wav_of

from vita_audio.cli.arguments import command_parser
from vita_audio.extras import needs_extra
from vita_audio.provenance import versions

with needs_extra("dev"):
    import openai

FRAMES = [
    "",
    "{",
    "[]",
    '{"type": "x"}',
    '{"type": "input_audio_buffer.append", "audio": 1}',
    "\u0000",
    "\ud7ff" * 999,
]
BODIES = [b"", b"{", b"[]", b'{"model": 1}', b'{"model": "x", "x": NaN}', b"\xff\xfe", b"[" * 9999, b"null"]
TYPES = ["application/json", "multipart/form-data; boundary=x", "text/plain"]
PATHS = ["audio/speech", "chat/completions", "audio/transcriptions", "nothing"]
PATIENCE_SECONDS = 600
SETTLED_SECONDS = 120
LEAVES = 0.2
"""Share of the visits that end early."""
LEFT_EARLY = "left early"


@dataclass
class Crowd:
    """What happened.

    Attributes:
        counts: visits by how they ended.
        failures: what went wrong with honest requests, and malformed ones that were not refused.
        samples: the server's figures at each second.
    """

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    samples: list[dict[str, float]] = field(default_factory=list)


def main(argv: list[str] | None = None) -> None:
    """Run, print, and draw."""
    args = parse(argv)
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # a line for each request
    crowd, record = asyncio.run(soak(args))
    if args.png is not None:
        draw(crowd, args.png)
    record |= {"benchmark": "soak", "versions": versions()}
    if args.output is not None:
        args.output.write_text(json.dumps(record | {"samples": crowd.samples}) + "\n", encoding="utf-8")
    print(json.dumps(record))
    faults = [name for name, fine in verdict(record, args.most_growth_mb).items() if not fine]
    if faults:
        raise ValueError(f"the server did not stand it: {', '.join(faults)}; {crowd.failures[:3]}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__, prog="tools/benchmark.py soak")
    add_server(parser)
    add_questions(parser)
    add_visitors(parser, talkers=8)
    parser.add_argument("--seconds", type=int, default=1200, metavar="N", help="how long")
    parser.add_argument(
        "--warm_up", type=int, default=5, metavar="N", help="seconds before anything is counted"
    )
    parser.add_argument(
        "--most_growth_mb", type=float, default=20, metavar="MB", help="growth of memory that is accepted"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw memory, threads and files over time")
    return parser.parse_args(argv)


def add_visitors(parser: argparse.ArgumentParser, talkers: int) -> None:
    """Flags of a benchmark whose visitors are those of :func:`talk`."""
    parser.add_argument("--talkers", type=int, default=talkers, metavar="N", help="visitors at once")
    parser.add_argument(
        "--pause", type=float, default=0.3, metavar="S", help="mean pause between visits, in seconds"
    )


async def soak(args: argparse.Namespace) -> tuple[Crowd, dict[str, Any]]:
    """Let the crowd in, count, and wait until all have left."""
    questions = read_questions(args.questions, args.limit)
    await visit_all(args, questions, args.warm_up)  # what is made once is made
    before = await idle(args)
    crowd = await visit_all(args, questions, args.seconds)
    after = await idle(args)
    memory = [sample["memory_mb"] for sample in crowd.samples]
    settled = memory[min(SETTLED_SECONDS, len(memory) // 2)]
    return crowd, {
        "talkers": args.talkers,
        "seconds": len(memory),
        "visits": dict(crowd.counts),
        "failures": len(crowd.failures),
        "memory_mb": {"after_two_minutes": settled, "largest": max(memory), "end": after["memory_mb"]},
        "growth_mb": max(memory[-1], after["memory_mb"]) - settled,
        "slots_and_connections_left": after["slots_used"] + after["sessions"] + after["queue"],
        "threads_left": after["threads"] - before["threads"],
        "files_left": after["files"] - before["files"],
    }


def verdict(record: dict[str, Any], most_growth_mb: float) -> dict[str, bool]:
    """What has to hold, and whether it does. The threads of a pool are made when they are first needed."""
    return {
        "failures": not record["failures"],
        "slots_and_connections_left": not record["slots_and_connections_left"],
        "threads_left": record["threads_left"] <= record["talkers"],
        "files_left": record["files_left"] <= 2,
        "growth_mb": record["growth_mb"] < most_growth_mb,
    }


async def visit_all(args: argparse.Namespace, questions: list[bytes], seconds: int) -> Crowd:
    """Talkers come and go for some seconds, and until each kind of visit has happened or one has failed."""
    crowd, over = Crowd(), asyncio.Event()
    talkers = [
        asyncio.create_task(talk(args, questions, random.Random(seed), crowd, over))
        for seed in range(args.talkers)
    ]
    kinds = {LEFT_EARLY, *(kind.__name__ for kind in KINDS)}
    while len(crowd.samples) < seconds or not (crowd.failures or kinds <= set(crowd.counts)):
        crowd.samples.append(await figures(args))
        await asyncio.sleep(1)
    over.set()
    await asyncio.gather(*talkers)
    return crowd


async def talk(
    args: argparse.Namespace, questions: list[bytes], chance: random.Random, crowd: Crowd, over: asyncio.Event
) -> None:
    """One visit after the other."""
    async with openai.AsyncOpenAI(
        base_url=f"{args.url}/v1", api_key=args.api_key, max_retries=0, timeout=PATIENCE_SECONDS
    ) as client:
        while not over.is_set():
            kind = chance.choice(KINDS)
            visit = kind(args, client, chance.choice(questions), chance)
            leaves = kind is not malformed and chance.random() < LEAVES
            try:
                async with asyncio.timeout(chance.random() * 2 if leaves else PATIENCE_SECONDS):
                    await visit
                crowd.counts[kind.__name__] += 1
            except TimeoutError:
                crowd.counts[LEFT_EARLY] += 1
                if not leaves:
                    crowd.failures.append(f"{kind.__name__}: no answer in {PATIENCE_SECONDS} s")
            except Exception as error:
                crowd.failures.append(f"{kind.__name__}: {type(error).__name__}: {error}")
            await asyncio.sleep(chance.expovariate(1 / args.pause))


async def realtime(args: argparse.Namespace, client: Any, question: bytes, chance: random.Random) -> None:
    """One to three turns on a connection, nonsense between them; each must be answered completely."""
    address = args.url.replace("http", "ws", 1) + "/v1/realtime"
    headers = {"Authorization": f"Bearer {args.api_key}"}
    async with websockets.connect(address, additional_headers=headers) as socket:
        for _ in range(chance.randint(1, 3)):
            if chance.random() < 0.3:
                await socket.send(chance.choice(FRAMES))
            await ask_on(socket, question)


async def chat(args: argparse.Namespace, client: Any, question: bytes, chance: random.Random) -> None:
    """A spoken question, its answer as a stream."""
    data = base64.b64encode(wav_of(question)).decode()
    part = {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
    chunks = await client.chat.completions.create(
        model=await name_of(client), messages=[{"role": "user", "content": [part]}], stream=True,
        modalities=["text", "audio"], audio={"voice": "default", "format": "pcm16"},
    )  # fmt: skip
    ends = [chunk.choices[0].finish_reason async for chunk in chunks if chunk.choices]
    if ends[-1] not in ("stop", "length"):
        raise RuntimeError("the stream has no end")


async def transcription(
    args: argparse.Namespace, client: Any, question: bytes, chance: random.Random
) -> None:
    """A clip as text."""
    file = ("question.wav", wav_of(question))
    await client.audio.transcriptions.create(model=await name_of(client), file=file)


async def speech(args: argparse.Namespace, client: Any, question: bytes, chance: random.Random) -> None:
    """A text as sound."""
    container = chance.choice(["wav", "pcm", "flac", "opus", "mp3"])
    sound = await client.audio.speech.create(
        model=await name_of(client), voice="default", input="one two three", response_format=container
    )
    if len(await sound.aread()) < RATE // 100:
        raise RuntimeError("there is no sound")


async def malformed(args: argparse.Namespace, client: Any, question: bytes, chance: random.Random) -> None:
    """A body that must be refused."""
    body = Body(
        f"{args.url}/v1/{chance.choice(PATHS)}",
        chance.choice(BODIES),
        {"Content-Type": chance.choice(TYPES), "Authorization": f"Bearer {args.api_key}"},
    )
    try:
        await asyncio.to_thread(urlopen, body, timeout=PATIENCE_SECONDS)
    except HTTPError as error:
        with error:
            if error.code < 500:
                return
            raise
    raise RuntimeError("a malformed body was accepted")


KINDS = [realtime, realtime, chat, transcription, speech, malformed]


async def name_of(client: Any) -> str:
    """The name of the model that is served."""
    return str((await client.models.list()).data[0].id)


async def figures(args: argparse.Namespace) -> dict[str, float]:
    """The server's own figures."""
    found = await asyncio.to_thread(read_metrics, args.url)
    names = ("slots_used", "queue", "sessions", "threads")
    return {
        "memory_mb": found["process_resident_memory_bytes"] / 1e6,
        "files": found["process_open_fds"],
        **{name: found[f"vita_audio_{name}"] for name in names},
    }


async def idle(args: argparse.Namespace) -> dict[str, float]:
    """The figures once nothing is used, or after half a minute."""
    deadline = time.monotonic() + 30
    while True:
        now = await figures(args)
        if time.monotonic() > deadline or not now["slots_used"] + now["queue"] + now["sessions"]:
            await asyncio.sleep(1)
            return await figures(args)
        await asyncio.sleep(0.2)


def draw(crowd: Crowd, file: Path) -> None:
    """Memory, threads and files over time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    minutes = [second / 60 for second in range(len(crowd.samples))]
    above.plot(minutes, [sample["memory_mb"] for sample in crowd.samples], linewidth=1)
    above.set_ylabel("resident memory, MB")
    for name in ("threads", "files", "slots_used"):
        below.plot(
            minutes, [sample[name] for sample in crowd.samples], label=name.replace("_", " "), linewidth=1
        )
    below.set_xlabel("minutes")
    below.legend(frameon=False, fontsize=8, ncols=3)
    for panel in (above, below):
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_ylim(bottom=0)
    figure.savefig(file, dpi=150)
