"""Seconds to each chunk of a spoken answer, from the question to the sound, through model and codec.

``python tools/benchmark.py sts --model_name_or_path DIR --audio_tokenizer_path DIR --question question.wav``

Compares two ways, after a warm-up run: decoding every chunk as soon as its codes are generated, and decoding the
whole answer at the end. A listener waits for the first sound of the former, or for all of the latter.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from vita_audio.cli.arguments import CODEC, GENERATION, RUNTIME, command_parser
from vita_audio.inference import AudioChunk, Conversation, GenerationOptions, Reply, SpeechPipeline, prompts


def main(argv: Sequence[str]) -> None:
    parser = command_parser(__doc__, prog="benchmark.py sts")
    parser.add_argument("--model_name_or_path", required=True, metavar="DIR")
    parser.add_argument("--question", required=True, metavar="WAV", help="a spoken question")
    for group in (CODEC, RUNTIME, GENERATION):
        group.add_to(parser)
    args = parser.parse_args(argv)
    pipeline = SpeechPipeline.open(args.model_name_or_path, CODEC.read(args), RUNTIME.read(args))
    options = GENERATION.read(args)
    question = prompts.speech_to_speech(args.question, system=pipeline.system_message())

    whole, streamed, chunks = stream(pipeline, question, options)
    table = Table(
        "chunk", "codes", "speech, s", "ready after, s", title=f"{streamed.options.schedule.name}, streamed"
    )
    for number, chunk in enumerate(chunks, start=1):
        speech = len(chunk.samples) / pipeline.codec.sample_rate
        table.add_row(str(number), str(len(chunk.codes)), f"{speech:.2f}", f"{chunk.seconds:.3f}")
    console = Console()
    console.print(table)
    first, total = streamed.timings.first_sound or chunks[-1].seconds, whole.timings.total
    console.print(
        f"first sound after {first:.3f} s; whole answer after {total:.3f} s, {total / first:.1f} times later"
    )
    print(json.dumps({"benchmark": "sts", "chunk_seconds": [round(chunk.seconds, 4) for chunk in chunks],
                      "first_sound_seconds": round(first, 4), "whole_seconds": round(total, 4)}))  # fmt: skip


def stream(
    pipeline: SpeechPipeline, question: Conversation, options: GenerationOptions
) -> tuple[Reply, Reply, list[AudioChunk]]:
    """An answer decoded at the end, and the same answer streamed with its chunks; the first run of each warms up.

    Raises:
        ValueError: the answer contains no speech.
    """
    for _ in range(2):
        whole = pipeline.reply(question, options)
        *events, streamed = pipeline.stream(question, options)
    chunks = [event for event in events if isinstance(event, AudioChunk)]
    if not chunks or not isinstance(streamed, Reply):
        raise ValueError(f"{question.audios[0]}: the answer contains no speech, so there is nothing to time")
    return whole, streamed, chunks
