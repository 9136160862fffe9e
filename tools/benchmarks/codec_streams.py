"""Several replies through the GLM-4-Voice codec: one by one, and in step.

``python tools/benchmark.py codec-streams --device cpu --max_steps 1``

All replies have all their codes at the start. One by one, each is decoded from its first to its last chunk
before the next begins. In step, one speech worker decodes them together: first chunks first, then in turns. On a GPU
the chunks that are due at the same place of a reply share each solver step; on a CPU, where arithmetic is the limit,
every chunk has its own (:meth:`FlowDecoder.generate`), and what is gained is the order.

For both: seconds of computation per second of speech, and the seconds until every reply has been heard, which is the
longest wait for a first chunk. The limit of a pass that many replies share is the work of one of them.
The samples of both ways are compared; they must be equal.

Everything runs at the released sizes with random weights, since time does not depend on their values;
``--flow FOLDER`` uses the decoder in a folder instead. ``--max_steps`` caps the solver steps.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from vita_audio.audio import AudioTokenizer
from vita_audio.audio.glm4voice import FlowDecoder, GLM4VoiceTokenizer, StreamSchedule, Vocoder
from vita_audio.audio.glm4voice.config import FlowConfig, VocoderConfig
from vita_audio.audio.glm4voice.streaming import REPLY_SCHEDULE
from vita_audio.cli.arguments import command_parser
from vita_audio.engine import SpeechWorker

WAYS = ("one by one", "in step")

console = Console()


@dataclass
class Run:
    """Samples of each reply, the seconds until each was heard, and the seconds of all the work."""

    waves: list[torch.Tensor]
    heard: list[float]
    seconds: float


def main(argv: list[str]) -> None:
    arguments = parse(argv)
    torch.set_num_threads(arguments.threads)
    codec = build_codec(arguments)
    in_step(codec, [[1] * 24])  # warm up
    table = Table(title=f"Replies of {arguments.codes} codes, {codec.device}, {arguments.threads} thread(s)")
    for column in ("replies", "way", "work (s) per s of speech", "all heard after (s)", "difference"):
        table.add_column(column, justify="left" if column == "way" else "right")
    summary: dict[str, dict[str, dict[str, float]]] = {}
    for count in track(arguments.streams, "replies", console=console):
        generator = torch.Generator().manual_seed(count)
        replies = torch.randint(codec.codebook_size, (count, arguments.codes), generator=generator).tolist()
        runs = dict(zip(WAYS, (one_by_one(codec, replies), in_step(codec, replies)), strict=True))
        expected = runs[WAYS[0]].waves
        speech = sum(map(len, expected)) / codec.sample_rate
        for way, run in runs.items():
            difference = max(
                float((wave - other).abs().max()) for wave, other in zip(run.waves, expected, strict=True)
            )
            figures = {
                "work_per_second": round(run.seconds / speech, 3),
                "all_heard_s": round(max(run.heard), 3),
                "difference": difference,
            }
            summary.setdefault(str(count), {})[way.replace(" ", "_")] = figures
            table.add_row(str(count), way, *(f"{figure:.3g}" for figure in figures.values()))
    console.print(table)
    console.print(gains(summary))
    print(json.dumps(summary))


def parse(argv: list[str]) -> argparse.Namespace:
    parser = command_parser(__doc__, prog="benchmark.py codec-streams")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 8], help="numbers of replies")
    parser.add_argument("--codes", type=int, default=56, help="codes of a reply, 12.5 a second")
    parser.add_argument("--max_steps", type=int, default=10, help="solver steps of a chunk, at most")
    parser.add_argument("--flow", default=None, help="decoder folder; random weights by default")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


class RandomCodec(GLM4VoiceTokenizer):
    """The released decoder with random weights."""

    def __init__(self, device: str, schedule: StreamSchedule):
        super().__init__(device=device, schedule=schedule)
        torch.manual_seed(0)
        self._flow = FlowDecoder(FlowConfig()).to(device)
        self._vocoder = Vocoder(VocoderConfig()).fold_weight_norm().to(device)
        self.codebook_size = self._flow.config.vocab_size

    @property
    def flow(self) -> FlowDecoder:
        return self._flow

    @property
    def vocoder(self) -> Vocoder:
        return self._vocoder


def build_codec(arguments: argparse.Namespace) -> GLM4VoiceTokenizer:
    schedule = StreamSchedule(
        tuple((codes, min(steps, arguments.max_steps)) for codes, steps in REPLY_SCHEDULE.chunks)
    )
    if arguments.flow is None:
        return RandomCodec(arguments.device, schedule)
    return GLM4VoiceTokenizer(flow_path=arguments.flow, device=arguments.device, schedule=schedule)


def one_by_one(codec: AudioTokenizer, replies: list[list[int]]) -> Run:
    """Decode each reply from beginning to end before the next."""
    run, start = Run([], [], 0.0), time.perf_counter()
    with torch.inference_mode():
        for number, codes in enumerate(replies):
            stream, parts, place = codec.stream(torch.Generator().manual_seed(number)), [], 0
            while place < len(codes):
                count = stream.missing
                parts.append(stream.push(codes[place : place + count]))
                place += count
                if len(run.heard) == number and len(parts[-1]):
                    run.heard.append(time.perf_counter() - start)
            run.waves.append(torch.cat([*parts, stream.push([], last=True)]))
    run.seconds = time.perf_counter() - start
    return run


def in_step(codec: AudioTokenizer, replies: list[list[int]]) -> Run:
    """Decode all replies with one worker."""
    start = time.perf_counter()
    with SpeechWorker(codec, threaded=False) as worker:
        streams = [worker.open(torch.Generator().manual_seed(number)) for number in range(len(replies))]
        for stream, codes in zip(streams, replies, strict=True):
            stream.push(codes)
            stream.finish()
        while worker.step():
            pass
        seconds = time.perf_counter() - start
        chunks = [list(stream) for stream in streams]
    return Run(
        [torch.cat([chunk.samples for chunk in reply]) for reply in chunks],
        [reply[0].decoded_at - start for reply in chunks],
        seconds,
    )


def gains(summary: dict[str, dict[str, dict[str, float]]]) -> str:
    """One line per number of replies: how many times less work and waiting."""
    lines = []
    for count, (first, second) in ((count, tuple(ways.values())) for count, ways in summary.items()):
        work = first["work_per_second"] / second["work_per_second"]
        wait = first["all_heard_s"] / second["all_heard_s"]
        lines.append(f"{count} in step: {work:.2f} times less work, all heard {wait:.1f} times sooner")
    return "\n".join(lines)
