"""Lossless replies of a trained model against Vanilla's: are they equal, and how much faster are they?

``python tools/benchmark.py lossless --model_name_or_path MODEL --audio_tokenizer_path CODEC
--questions quickstart/corpus/sqa_test.jsonl quickstart/corpus/tts_test.jsonl``

Every request of the files is answered in both modes in turn, ``--repeats`` times; the figures are medians of the rounds
through a file. Tokens per second are given twice: over the whole time of the replies, which includes computing their
prompts, and from the end of each reply's first round on. Vanilla makes up to four tokens in its first round, a lossless
reply one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from vita_audio.chat import ChatTokens, read_samples
from vita_audio.cli.arguments import CODEC, RUNTIME, command_parser
from vita_audio.engine import Engine, Finished, Request, Tokens
from vita_audio.inference import EngineBackend, SpeechPipeline, prompts

console = Console()


@dataclass
class Pass:
    """All replies of a file in one mode: seconds and tokens, of all rounds and of all but the first."""

    seconds: float = 0.0
    tokens: int = 0
    later_seconds: float = 0.0
    later_tokens: int = 0
    drafts: int = 0
    accepted: int = 0
    replies: list[list[int]] = field(default_factory=list)

    def answer(self, engine: Engine, request: Request) -> None:
        """Add one reply."""
        start, reply, first = time.perf_counter(), list[int](), None
        for event in engine.submit(request):
            if isinstance(event, Tokens):
                reply += event.ids
                first = first or (time.perf_counter(), len(reply))
            elif isinstance(event, Finished):
                self.drafts += event.stats.drafts
                self.accepted += event.stats.accepted
        end = time.perf_counter()
        assert first is not None
        self.seconds += end - start
        self.tokens += len(reply)
        self.later_seconds += end - first[0]
        self.later_tokens += len(reply) - first[1]
        self.replies.append(reply)

    @property
    def speeds(self) -> tuple[float, float]:
        """Tokens per second: of all rounds, of all but the first."""
        return self.tokens / self.seconds, self.later_tokens / max(self.later_seconds, 1e-9)


def main(argv: Sequence[str]) -> None:
    args = parse(argv)
    pipeline = SpeechPipeline.open(args.model_name_or_path, CODEC.read(args), RUNTIME.read(args))
    if not isinstance(pipeline.backend, EngineBackend):
        raise ValueError("this model does not run on the engine")
    table = Table(title="tokens/s, Vanilla → lossless")
    for column in (
        "requests",
        "replies",
        "equal",
        "with prompts",
        "×",
        "after the first round",
        "×",
        "accepted",
    ):
        table.add_column(column, justify="left" if column == "requests" else "right")
    summary = {}
    for file in args.questions:
        rounds = list(compare(pipeline, pipeline.backend.engine, file, args))
        vanilla, lossless = rounds[-1]
        equal = sum(one == other for one, other in zip(vanilla.replies, lossless.replies, strict=True))
        accepted = lossless.accepted / max(lossless.drafts, 1)
        figures = {"replies": len(vanilla.replies), "equal": equal, "accepted": round(accepted, 3)}
        cells = []
        for number, name in enumerate(("", "_after_first_round")):
            speeds = [[mode.speeds[number] for mode in both] for both in rounds]
            slow, fast = (round(statistics.median(column), 1) for column in zip(*speeds, strict=True))
            ratios = [fast / slow for slow, fast in speeds if slow]  # a reply may end in its first round
            ratio = round(statistics.median(ratios), 3) if ratios else None
            figures |= {f"tokens_per_second{name}": [slow, fast], f"ratio{name}": ratio}
            cells += [f"{slow:.0f} → {fast:.0f}", "–" if ratio is None else f"{ratio:.2f}"]
        table.add_row(file.stem, str(len(vanilla.replies)), str(equal), *cells, f"{accepted:.0%}")
        summary[file.stem] = figures
    console.print(table)
    print(json.dumps(summary))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = command_parser(__doc__, prog="benchmark.py lossless")
    parser.add_argument("--model_name_or_path", required=True, metavar="DIR", help="a checkpoint")
    parser.add_argument(
        "--questions",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE",
        help="samples whose requests are answered",
    )
    parser.add_argument("--limit", type=int, default=100, metavar="N", help="requests of each file")
    parser.add_argument("--max_new_tokens", type=int, default=512, help="of each reply")
    parser.add_argument(
        "--repeats", type=int, default=5, help="rounds through each file, after one to warm up"
    )
    RUNTIME.add_to(parser)
    CODEC.add_to(parser)
    args = parser.parse_args(argv)
    for name in ("limit", "max_new_tokens", "repeats"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: give 1 or more")
    return args


def compare(
    pipeline: SpeechPipeline, engine: Engine, file: Path, args: argparse.Namespace
) -> Iterator[tuple[Pass, Pass]]:
    """Vanilla's and the lossless replies to a file, ``repeats`` times."""
    requests = read_prompts(pipeline, file, args.limit)
    stops = ChatTokens.of(pipeline.tokenizer).stops
    for number in track(range(1 + args.repeats), file.stem, console=console, transient=True):
        both = Pass(), Pass()
        for prompt in requests:
            for lossless, mode in zip((False, True), both, strict=True):
                mode.answer(
                    engine,
                    Request(
                        prompt,
                        "vanilla",
                        lossless=lossless,
                        stop_tokens=stops,
                        max_new_tokens=args.max_new_tokens,
                    ),
                )
        if number:
            yield both


def read_prompts(pipeline: SpeechPipeline, file: Path, limit: int) -> list[list[int]]:
    """Token ids of the first requests of a file, each ending where the reply begins.

    Raises:
        ValueError: the file holds none, or the model takes speech as features.
    """
    found = []
    for _, sample in read_samples(file):
        prompt = pipeline.prompt(prompts.from_sample(sample))
        if prompt.features:
            raise ValueError(
                "this model takes speech as features; give one that reads codes, or typed questions"
            )
        found.append([int(token) for token in prompt.input_ids])
        if len(found) == limit:
            break
    if not found:
        raise ValueError(f"{file}: holds no sample")
    return found
