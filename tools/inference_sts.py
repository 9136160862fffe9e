"""Talk to a model: text, speech-to-speech, ASR, TTS and voice cloning, streaming or not.

    python tools/inference_sts.py --model_name_or_path DIR --audio_tokenizer_type mel_vq \\
        --audio_tokenizer_path DIR --tts "good morning" --question question.wav --output_dir out

Each request is answered twice, whole and streaming (``--stream`` / ``--no-stream`` choose one),
in every mode asked for. Replies are written as WAV files, listed in ``OUTPUT_DIR/replies.jsonl``,
and summed up in a table. Requests come from the flags, from ``--samples FILE`` (JSON lines in the
training data's format; the last assistant message is left out), or both.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pipeline_arguments import (
    add_codec_arguments,
    add_generation_arguments,
    add_model_arguments,
    add_system_prompt_argument,
    generation_options,
    open_pipeline,
    run,
    system_prompt,
)
from rich.console import Console
from rich.table import Table

from vita_audio.audio import save_audio
from vita_audio.chat import read_samples as read_sample_file
from vita_audio.inference import (
    SCHEDULES,
    Conversation,
    GenerationOptions,
    Reply,
    SpeechPipeline,
    TextDelta,
    prompts,
)


@dataclass(frozen=True)
class Request:
    """One thing to ask, under a name that its files bear."""

    name: str
    task: str
    conversation: Conversation


def main() -> None:
    args = parse_args()
    requests = list(read_requests(args))
    if not requests:
        raise ValueError("nothing to answer: give --text, --question, --asr, --tts or --samples")
    pipeline = open_pipeline(args)
    console = Console()
    table = new_table()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    with (args.output_dir / "replies.jsonl").open("w", encoding="utf-8") as log:
        for options in mode_options(args):
            # The first call on a device compiles and allocates; it is not a measure of speed.
            pipeline.reply(requests[0].conversation, replace(options, max_new_tokens=16), decode=False)
            for request in requests:
                for streaming in streaming_choices(args):
                    reply = answer(pipeline, request, options, streaming, console)
                    record = write(reply, request, options, streaming, args.output_dir)
                    log.write(json.dumps(record, ensure_ascii=False) + "\n")
                    add_row(table, request, options, streaming, reply)
    console.print(table)
    console.print(f"replies and WAV files are in {args.output_dir}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_arguments(parser)
    add_codec_arguments(parser)
    add_generation_arguments(parser)
    group = parser.add_argument_group("requests; each may be given several times")
    group.add_argument("--text", action="append", default=[], help="a typed question")
    group.add_argument("--question", action="append", default=[], metavar="WAV", help="a spoken question")
    group.add_argument("--asr", action="append", default=[], metavar="WAV", help="speech to write down")
    group.add_argument("--tts", action="append", default=[], metavar="TEXT", help="text to read aloud")
    group.add_argument("--voice", metavar="WAV", help="voice for the --tts texts (cloning)")
    group.add_argument("--samples", type=Path, metavar="FILE", help="JSON lines of samples")
    group.add_argument(
        "--data_root", type=Path, metavar="DIR", help="where relative paths in --samples start"
    )
    add_system_prompt_argument(parser, default="luke")
    parser.add_argument(
        "--stream", action=argparse.BooleanOptionalAction, help="default: both, one after the other"
    )
    parser.add_argument(
        "--all_modes", action="store_true", help="answer in Vanilla, Balance, Boost and Turbo"
    )
    parser.add_argument("--output_dir", type=Path, default=Path("output/inference"), metavar="DIR")
    return parser.parse_args()


def read_requests(args: argparse.Namespace) -> Iterator[Request]:
    system = system_prompt(args)
    for number, text in enumerate(args.text, start=1):
        yield Request(f"text_{number}", "text", prompts.chat(text, system))
    for number, audio in enumerate(map(existing, args.question), start=1):
        yield Request(
            f"question_{number}_{audio.stem}", "speech QA", prompts.speech_to_speech(audio, system=system)
        )
    for number, audio in enumerate(map(existing, args.asr), start=1):
        yield Request(f"asr_{number}_{audio.stem}", "ASR", prompts.transcription(audio))
    for number, text in enumerate(args.tts, start=1):
        yield Request(f"tts_{number}", "TTS", prompts.synthesis(text))
        if args.voice:
            yield Request(f"clone_{number}", "voice clone", prompts.synthesis(text, existing(args.voice)))
    if args.voice and not args.tts:
        raise ValueError("--voice is the voice of the --tts texts; give --tts")
    if args.samples:
        yield from read_samples(args.samples, args.data_root or args.samples.parent)


def read_samples(path: Path, data_root: Path) -> Iterator[Request]:
    """Samples are asked as they stand, without a system message of ours."""
    for number, sample in read_sample_file(path, data_root, answer_lists=True):
        for audio in sample.audios:
            existing(audio)
        conversation = prompts.from_sample(sample)
        task = prompts.task_of(conversation)
        name = "".join(c if c.isalnum() or c in "-_" else "_" for c in sample.id or str(number))
        yield Request(f"{task.replace(' ', '_').lower()}_{name}", task, conversation)


def existing(path: str | Path) -> Path:
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    return Path(path)


def mode_options(args: argparse.Namespace) -> list[GenerationOptions]:
    options = generation_options(args)
    return [replace(options, mode=mode) for mode in SCHEDULES] if args.all_modes else [options]


def streaming_choices(args: argparse.Namespace) -> list[bool]:
    return [False, True] if args.stream is None else [args.stream]


def answer(
    pipeline: SpeechPipeline,
    request: Request,
    options: GenerationOptions,
    streaming: bool,
    console: Console,
) -> Reply:
    title = f"[bold]{request.name}[/bold] · {options.mode} · {'streaming' if streaming else 'whole'}: "
    console.print(title, end="")
    if not streaming:
        reply = pipeline.reply(request.conversation, options)
        console.print(reply.text, markup=False)
        return reply
    for event in pipeline.stream(request.conversation, options):
        if isinstance(event, TextDelta):
            console.print(event.text, end="", markup=False, highlight=False)
        elif isinstance(event, Reply):
            console.print()
            return event
        else:
            console.print("♪", end="", style="cyan")
    raise RuntimeError("the stream ended without a reply")


def write(
    reply: Reply, request: Request, options: GenerationOptions, streaming: bool, folder: Path
) -> dict[str, object]:
    """Save the speech; the record names its file, or None without speech."""
    name = None
    if reply.waveform is not None and len(reply.waveform):
        mode = str(options.mode).replace(" ", "-")
        name = f"{request.name}_{mode}{'_stream' if streaming else ''}.wav"
        save_audio(folder / name, reply.waveform, reply.sample_rate)
    return {
        "name": request.name,
        "task": request.task,
        "mode": options.mode,
        "streaming": streaming,
        "question": [
            {"role": message.role, "content": message.content} for message in request.conversation.messages
        ],
        "audios": [str(audio) for audio in request.conversation.audios],
        "text": reply.text,
        "codes": reply.codes,
        "wav": name,
        "timings": asdict(reply.timings) | {"tokens_per_second": reply.timings.tokens_per_second},
    }


def new_table() -> Table:
    table = Table(title="replies")
    for column in ("request", "task", "mode", "stream", "text"):
        table.add_column(column, overflow="fold")
    for column in ("speech s", "first chunk ms", "first sound ms", "tokens/s"):
        table.add_column(column, justify="right")
    return table


def add_row(
    table: Table, request: Request, options: GenerationOptions, streaming: bool, reply: Reply
) -> None:
    def milliseconds(value: float | None) -> str:
        return "–" if value is None else f"{1000 * value:.0f}"

    seconds = 0 if reply.waveform is None else len(reply.waveform) / reply.sample_rate
    table.add_row(
        request.name,
        request.task,
        str(options.mode),
        "yes" if streaming else "no",
        reply.text.strip(),
        f"{seconds:.2f}",
        milliseconds(reply.timings.first_chunk),
        milliseconds(
            reply.timings.first_sound if streaming else (reply.codes and reply.timings.total) or None
        ),
        f"{reply.timings.tokens_per_second:.0f}",
    )


if __name__ == "__main__":
    run(main)
