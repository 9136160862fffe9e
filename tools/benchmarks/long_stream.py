"""One long reply in company: does its sound come evenly, and does a chunk cost the same at the end as at the start?

``python tools/benchmark.py long-stream --model_name_or_path MODEL --audio_tokenizer_type mel_vq
--audio_tokenizer_path CODEC``

The engine makes the codes, and one codec worker decodes them between the rounds, as for every reply on a CPU. The
first reply is followed, alone and then among others that begin again as they end: the time between its rounds, and what
the codec takes for a second of its speech, in parts of ten seconds. Both should be the same from the first part to
the last. Rounds take longer as the caches grow, by the little that attention costs.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, field

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from vita_audio.chat import ChatTokens
from vita_audio.cli.arguments import CODEC, RUNTIME, command_parser
from vita_audio.engine import Engine, Handle, Request, SpeechStream, SpeechWorker, Tokens
from vita_audio.inference import EngineBackend, SpeechPipeline, prompts

PART = 10
"""Seconds of speech of a row of the table."""
SENTENCE = "seven two three six one nine four"

console = Console()


@dataclass
class Part:
    """Ten seconds of speech: ms between its rounds, and ms of decoding per second of speech."""

    gaps: list[float] = field(default_factory=list)
    decoding: list[float] = field(default_factory=list)


def main(argv: list[str]) -> None:
    arguments = parse(argv)
    pipeline = SpeechPipeline.open(
        arguments.model_name_or_path, CODEC.read(arguments), RUNTIME.read(arguments)
    )
    if not isinstance(pipeline.backend, EngineBackend):
        raise ValueError("this model does not run on the engine")
    summary = {}
    for talkers in arguments.talkers:
        parts = follow(pipeline, pipeline.backend.engine, talkers, arguments)
        table = Table(title=f"A reply of {arguments.seconds} s, {talkers} talker(s), {arguments.mode}")
        for column in ("speech", "rounds, ms p50", "p95", "codec, ms per s of speech"):
            table.add_column(column, justify="right")
        rows = []
        for number, part in enumerate(parts):
            p50, p95 = np.percentile(part.gaps, (50, 95))
            rows.append((round(p50, 1), round(p95, 1), round(float(np.median(part.decoding)), 2)))
            table.add_row(f"{PART * number} to {PART * (number + 1)} s", *map(str, rows[-1]))
        console.print(table)
        summary[str(talkers)] = {
            "gap_p50_ms": [row[0] for row in rows],
            "gap_p95_ms": [row[1] for row in rows],
            "codec_ms_per_s": [row[2] for row in rows],
        }
    print(json.dumps(summary))


def parse(argv: list[str]) -> argparse.Namespace:
    parser = command_parser(__doc__, prog="benchmark.py long-stream")
    parser.add_argument("--model_name_or_path", required=True, metavar="DIR", help="a checkpoint")
    parser.add_argument("--seconds", type=int, default=60, help="of the reply that is followed")
    parser.add_argument("--talkers", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--mode", default="boost", help="schedule of all replies")
    RUNTIME.add_to(parser)
    CODEC.add_to(parser)
    return parser.parse_args(argv)


def follow(
    pipeline: SpeechPipeline, engine: Engine, talkers: int, arguments: argparse.Namespace
) -> list[Part]:
    """Let ``talkers`` speak at once until the first has said all."""
    chat = ChatTokens.of(pipeline.tokenizer)
    prompt = [int(token) for token in pipeline.prompt(prompts.synthesis(SENTENCE)).input_ids]
    codec = pipeline.codec
    most = engine.max_length - len(prompt)

    def begin() -> tuple[Handle, SpeechStream]:
        request = Request(prompt, arguments.mode, audio_rows="on", max_new_tokens=most)
        return engine.submit(request), worker.open()

    def hear(handle: Handle, stream: SpeechStream) -> bool:
        """Hand the codes of finished rounds to the codec. Returns whether there was a round."""
        happened = False
        while (news := handle.pop()) is not None:
            if isinstance(news, Tokens):
                happened = True
                codes = [token - chat.first_code for token in news.ids]
                stream.push([code for code in codes if 0 <= code < chat.codebook_size])
        return happened

    parts: list[Part] = []
    with SpeechWorker(codec, threaded=False) as worker, Progress(console=console) as progress:
        bar = progress.add_task(f"{talkers} talker(s)", total=arguments.seconds)
        first, *others = [begin() for _ in range(talkers)]
        spoken, last = 0.0, time.perf_counter()
        while spoken < arguments.seconds:
            start = time.perf_counter()
            if worker.step():
                took = time.perf_counter() - start
                if chunks := first[1].take():
                    seconds = sum(len(chunk.samples) for chunk in chunks) / codec.sample_rate
                    parts_of(parts, spoken).decoding.append(1000 * took / seconds)
                    spoken += seconds
                    progress.update(bar, completed=min(spoken, arguments.seconds))
                continue
            if not engine.step() or first[0].finished is not None:
                raise ValueError(
                    f"the reply ended after {spoken:.0f} s of speech: the model says too little; give fewer --seconds"
                )
            if hear(*first):
                now = time.perf_counter()
                parts_of(parts, spoken).gaps.append(1000 * (now - last))
                last = now
            for number, (handle, stream) in enumerate(others):
                hear(handle, stream)
                stream.take()
                if handle.finished is not None:
                    stream.cancel()
                    others[number] = begin()
        for handle, _ in (first, *others):
            handle.cancel()
    return [part for part in parts if part.gaps and part.decoding]


def parts_of(parts: list[Part], spoken: float) -> Part:
    """The part that a second of speech belongs to; made when it begins."""
    while len(parts) <= spoken // PART:
        parts.append(Part())
    return parts[int(spoken // PART)]
