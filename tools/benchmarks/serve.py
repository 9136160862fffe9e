"""Latency of a running server under load: spoken questions over ``/v1/realtime`` at random times.

``python tools/benchmark.py serve --url http://127.0.0.1:8000 --questions FILE.jsonl --talkers 1 4 8``

Questions are the sound of the user's last message in each sample (JSON lines in the training data's format). Arrivals
are an open loop: gaps are exponential, with a mean that makes ``--talkers`` replies overlap on average if each takes as
long as its speech is played, and a new question does not wait for an old one. So a server that falls behind shows it.

For every reply: milliseconds from the commit, which is the end of the user's speech, to the first sound; pauses of a
player that begins with the first sound; seconds of generation per second of speech. Everything that is not a complete
reply is a failure. The server's resident memory is read from its ``/metrics``. A table is printed, ``--png`` draws it,
and the figures with versions are the last line, as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import random
import time
import wave
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, quantiles
from typing import Any
from urllib.request import urlopen

import websockets
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table

from vita_audio.audio import load_audio
from vita_audio.chat import prompts, read_samples
from vita_audio.cli.arguments import command_parser
from vita_audio.provenance import versions
from vita_audio.serving.sounds import RATE, to_pcm

APPEND_BYTES = RATE // 25 * 2

console = Console()


@dataclass(frozen=True)
class Turn:
    """One reply; seconds after the commit."""

    first_sound: float
    generated: float
    speech: float
    pauses: int


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    args = parse(argv)
    questions = read_questions(args.questions, args.limit)
    rows = {str(talkers): asyncio.run(load(args, questions, talkers)) for talkers in args.talkers}
    print_table(rows)
    record = {"benchmark": "serve", "turns": args.turns, "talkers": rows, "versions": versions()}
    if args.png is not None:
        draw(rows, args.png)
    if args.output is not None:
        args.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__, prog="tools/benchmark.py serve")
    add_server(parser)
    add_questions(parser)
    parser.add_argument(
        "--talkers", type=int, nargs="+", default=[1, 4, 8], metavar="N", help="replies that overlap"
    )
    parser.add_argument(
        "--turns", type=int, default=40, metavar="N", help="questions asked at each number of talkers"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the arrivals")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the latencies")
    return parser.parse_args(argv)


def add_server(parser: argparse.ArgumentParser, what: str = "server") -> None:
    """Flags of a benchmark that visits a server."""
    parser.add_argument("--url", default="http://127.0.0.1:8000", help=f"address of the {what}")
    parser.add_argument("--api_key", default="none", help=f"API key of the {what}")


def add_questions(parser: argparse.ArgumentParser) -> None:
    """Flags of a benchmark that asks spoken questions; see :func:`read_questions`."""
    parser.add_argument(
        "--questions", type=Path, required=True, metavar="FILE", help="samples with spoken questions"
    )
    parser.add_argument("--limit", type=int, default=20, metavar="N", help="questions to use")


def read_questions(file: Path, limit: int) -> list[bytes]:
    """The spoken questions as PCM at 24 kHz.

    Raises:
        ValueError: the file holds none.
    """
    spoken: list[bytes] = []
    for _, sample in read_samples(file):
        question = prompts.from_sample(sample)
        if question.messages[-1].num_audios and len(spoken) < limit:
            spoken.append(to_pcm(load_audio(question.audios[-1], RATE)[0]))
    if not spoken:
        raise ValueError(f"{file}: holds no spoken question")
    return spoken


async def load(args: argparse.Namespace, questions: list[bytes], talkers: int) -> dict[str, Any]:
    """Ask ``--turns`` questions such that ``talkers`` replies overlap on average."""
    chance = random.Random(args.seed)
    warm = await ask(args, questions[0])
    busy = max(warm.speech, warm.generated)
    tasks: list[asyncio.Task[Turn]] = []
    begin = time.perf_counter()
    for _ in range(args.turns):
        tasks.append(asyncio.create_task(ask(args, chance.choice(questions))))
        await asyncio.sleep(chance.expovariate(talkers / busy))
    results = await asyncio.gather(*tasks, return_exceptions=True)
    seconds = time.perf_counter() - begin
    turns = [each for each in results if isinstance(each, Turn)]
    if not turns:
        raise ValueError(f"no reply was complete; the first failure: {results[0]}")
    cuts = quantiles((1000 * turn.first_sound for turn in turns), n=100, method="inclusive")
    return {
        "first_sound_ms": {"p50": cuts[49], "p95": cuts[94], "p99": cuts[98]},
        "pauses": sum(turn.pauses for turn in turns),
        "real_time_factor": mean(turn.generated / turn.speech for turn in turns),
        "complete": len(turns) / len(results),
        "replies_per_second": len(turns) / seconds,
        "server_memory_mb": read_metrics(args.url)["process_resident_memory_bytes"] / 1e6,
    }


def read_metrics(url: str) -> dict[str, float]:
    """The server's figures by name; those of several replicas are added."""
    figures: Counter[str] = Counter()
    with urlopen(f"{url.rstrip('/')}/metrics", timeout=30) as page:
        for family in text_string_to_metric_families(page.read().decode()):
            for sample in family.samples:
                if set(sample.labels) <= {"replica"}:
                    figures[sample.name] += sample.value
    return figures


async def ask(args: argparse.Namespace, pcm: bytes) -> Turn:
    """One question on a connection of its own.

    Raises:
        RuntimeError: the reply is not complete.
    """
    address = args.url.rstrip("/").replace("http", "ws", 1) + "/v1/realtime"
    headers = {"Authorization": f"Bearer {args.api_key}"}
    async with websockets.connect(address, additional_headers=headers) as socket:
        return await ask_on(socket, pcm)


async def ask_on(socket: Any, pcm: bytes) -> Turn:
    """One question on an open connection.

    Raises:
        RuntimeError: the reply is not complete.
    """
    session = {"type": "realtime", "audio": {"input": {"turn_detection": None}}}
    await _send(socket, "session.update", session=session)
    for start in range(0, len(pcm), APPEND_BYTES):
        audio = base64.b64encode(pcm[start : start + APPEND_BYTES]).decode()
        await _send(socket, "input_audio_buffer.append", audio=audio)
    await _until(socket, "session.updated")
    # All of the speech must have been heard before it ends, as from a microphone.
    await _send(socket, "conversation.item.retrieve", item_id="none")
    while (await _until(socket, "error"))["error"]["code"] != "item_not_found":
        pass
    committed = time.perf_counter()
    await _send(socket, "input_audio_buffer.commit")
    await _send(socket, "response.create")
    return await _listen(socket, committed)


async def _listen(socket: Any, committed: float) -> Turn:
    first = ends = speech = 0.0
    pauses = 0
    async for text in socket:
        now = time.perf_counter() - committed
        event = json.loads(text)
        if event["type"] == "response.output_audio.delta":
            seconds = len(base64.b64decode(event["delta"])) / 2 / RATE
            if not first:
                first = ends = now
            pauses += now > ends
            ends = max(ends, now) + seconds
            speech += seconds
        elif event["type"] == "response.done":
            if event["response"]["status"] != "completed" or not speech:
                raise RuntimeError(f"the reply is {event['response']['status']}")
            return Turn(first, now, speech, pauses)
    raise RuntimeError("the connection ended")


async def _send(socket: Any, kind: str, **content: Any) -> None:
    await socket.send(json.dumps({"type": kind, **content}))


async def _until(socket: Any, kind: str) -> dict[str, Any]:
    while (event := json.loads(await socket.recv()))["type"] != kind:
        pass
    return dict(event)


def wav_of(pcm: bytes) -> bytes:
    """PCM as a sound file."""
    content = io.BytesIO()
    with wave.open(content, "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", ""))
        file.writeframes(pcm)
    return content.getvalue()


def print_table(rows: dict[str, dict[str, Any]]) -> None:
    table = Table(title="end of speech to first sound, ms")
    for column in ("talkers", "p50", "p95", "p99", "pauses", "RTF", "complete", "replies/s", "MB"):
        table.add_column(column, justify="right")
    for talkers, row in rows.items():
        latency = [f"{row['first_sound_ms'][name]:.0f}" for name in ("p50", "p95", "p99")]
        rest = f"{row['real_time_factor']:.2f}", f"{row['complete']:.0%}", f"{row['replies_per_second']:.1f}"
        table.add_row(talkers, *latency, str(row["pauses"]), *rest, f"{row['server_memory_mb']:.0f}")
    console.print(table)


def draw(rows: dict[str, dict[str, Any]], file: Path) -> None:
    """Percentiles of the latency over the number of talkers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    panel = figure.subplots()
    for name in ("p50", "p95", "p99"):
        panel.plot(
            [int(talkers) for talkers in rows],
            [row["first_sound_ms"][name] for row in rows.values()],
            marker="o",
            label=name,
        )
    panel.set_xlabel("talkers")
    panel.set_ylabel("end of speech to first sound, ms")
    panel.set_ylim(bottom=0)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False)
    figure.savefig(file, dpi=150)
