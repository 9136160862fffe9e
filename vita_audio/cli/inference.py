"""Talk to a model: text, speech-to-speech, ASR, TTS and voice cloning, streaming or not.

    python tools/inference_sts.py --model_name_or_path DIR --audio_tokenizer_type mel_vq \\
        --audio_tokenizer_path DIR --tts "good morning" --question question.wav --output_dir out

Each request is answered twice, whole and streaming (``--stream`` / ``--no_stream`` select one), in every requested
mode. Replies are written as WAV files, listed in ``OUTPUT_DIR/replies.jsonl``, and summarised in a table. Requests
come from the flags, from ``--samples FILE`` (JSON lines in the training data's format; the last assistant message is
dropped), or both. The original's benchmarks are ``python tools/benchmark.py generate`` and ``sts``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from vita_audio.audio import is_continuous_kind, save_audio
from vita_audio.chat import read_samples
from vita_audio.cli.arguments import CODEC, GENERATION, RUNTIME, add_system_prompt, command_parser
from vita_audio.inference import (
    SCHEDULES,
    CodecOptions,
    Conversation,
    GenerationOptions,
    Reply,
    SpeechPipeline,
    TextDelta,
    prompts,
)
from vita_audio.inference.options import system_message
from vita_audio.inference.pipeline import read_checkpoint_config

NOTHING_GIVEN = """\
inference_sts needs a model, its codec and a question:
  --model_name_or_path DIR      a folder saved by training
  --audio_tokenizer_type KIND --audio_tokenizer_path DIR [--flow_path DIR]      the codec it was trained with
  --text "…", --question WAV, --asr WAV, --tts "…" [--voice WAV] or --samples JSONL      the questions
No weights yet? bash scripts/quickstart.sh trains a small model and says how to talk to it. All flags: --help"""


@dataclass(frozen=True)
class Question:
    """One request, with the name used for its files."""

    name: str
    task: str
    conversation: Conversation


def main(argv: Sequence[str] | None = None) -> None:
    """Answer the requests of a command line.

    Raises:
        ValueError: a folder, file, device or option cannot be used; the message is one line.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv:
        sys.exit(NOTHING_GIVEN)
    args = parse(argv)
    options = mode_options(args)
    codec = CODEC.read(args)
    questions = list(read_questions(args))
    if not questions:
        raise ValueError("nothing to answer: give --text, --question, --asr, --tts or --samples")
    check_codec(codec, questions)
    pipeline = SpeechPipeline.open(args.model_name_or_path, codec, RUNTIME.read(args))
    args.output_dir.mkdir(parents=True, exist_ok=True)
    console, table = Console(), new_table()
    with (args.output_dir / "replies.jsonl").open("w", encoding="utf-8") as log:
        for choice in options:
            warm_up(pipeline, questions[0], choice)
            for question in questions:
                for streaming in [False, True] if args.stream is None else [args.stream]:
                    reply = answer(pipeline, question, choice, streaming, console)
                    record = write(reply, question, streaming, args.output_dir)
                    log.write(json.dumps(record, ensure_ascii=False) + "\n")
                    add_row(table, question, streaming, reply)
    console.print(table)
    console.print(f"replies and WAV files are in {args.output_dir}", soft_wrap=True)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument("--model_name_or_path", required=True, metavar="DIR", help="checkpoint folder")
    CODEC.add_to(parser)
    RUNTIME.add_to(parser)
    GENERATION.add_to(parser)
    group = parser.add_argument_group("requests; each flag may be given several times")
    group.add_argument("--text", action="append", default=[], help="a typed question")
    group.add_argument("--question", action="append", default=[], metavar="WAV", help="a spoken question")
    group.add_argument("--asr", action="append", default=[], metavar="WAV", help="speech to transcribe")
    group.add_argument("--tts", action="append", default=[], metavar="TEXT", help="text to read aloud")
    group.add_argument("--voice", metavar="WAV", help="recording of the voice for the --tts texts (cloning)")
    group.add_argument("--samples", type=Path, metavar="FILE", help="JSON lines of samples")
    group.add_argument(
        "--data_root", type=Path, metavar="DIR", help="base folder of relative paths in --samples"
    )
    add_system_prompt(parser)
    parser.add_argument(
        "--stream", action="store_true", default=None, help="only streaming (default: whole, then streaming)"
    )
    parser.add_argument("--no_stream", dest="stream", action="store_false", help="only whole replies")
    parser.add_argument(
        "--all_modes", action="store_true", help="answer in Vanilla, Balance, Boost and Turbo"
    )
    parser.add_argument("--output_dir", type=Path, default=Path("output/inference"), metavar="DIR")
    return parser.parse_args(argv)


def mode_options(args: argparse.Namespace) -> list[GenerationOptions]:
    """The options of each requested mode.

    Raises:
        ValueError: the mode is not a schedule.
    """
    options = GENERATION.read(args)
    if args.all_modes:
        return [replace(options, mode=mode) for mode in SCHEDULES]
    if options.mode is not None:
        _ = options.schedule  # refuses an unknown one
    return [options]


def read_questions(args: argparse.Namespace) -> Iterator[Question]:
    """The requests of the command line.

    Raises:
        ValueError: a file is missing, or the model's folder, which provides the system message of questions.
    """
    system = system_message(args.system_prompt, read_checkpoint_config(args.model_name_or_path))
    for number, text in enumerate(args.text, start=1):
        yield Question(f"text_{number}", "text", prompts.chat(text, system))
    for number, audio in enumerate(map(existing, args.question), start=1):
        conversation = prompts.speech_to_speech(audio, system=system)
        yield Question(f"question_{number}_{audio.stem}", "speech QA", conversation)
    for number, audio in enumerate(map(existing, args.asr), start=1):
        yield Question(f"asr_{number}_{audio.stem}", "ASR", prompts.transcription(audio))
    for number, text in enumerate(args.tts, start=1):
        yield Question(f"tts_{number}", "TTS", prompts.synthesis(text))
        if args.voice:
            conversation = prompts.synthesis(text, existing(args.voice))
            yield Question(f"clone_{number}", "voice clone", conversation)
    if args.voice and not args.tts:
        raise ValueError("--voice applies to the --tts texts; give --tts")
    if args.samples:
        yield from sample_questions(args.samples, args.data_root)


def sample_questions(path: Path, data_root: Path | None) -> Iterator[Question]:
    """The requests of a sample file, unchanged and without an added system message."""
    for number, sample in read_samples(path, data_root, answer_lists=True):
        for audio in sample.audios:
            existing(str(audio))
        conversation = prompts.from_sample(sample)
        task = prompts.task_of(conversation)
        name = "".join(c if c.isalnum() or c in "-_" else "_" for c in sample.id or "")[:80]
        # The number distinguishes ids that differ only in punctuation.
        yield Question(
            "_".join(filter(None, (task.replace(" ", "_").lower(), str(number), name))), task, conversation
        )


def existing(path: str | Path) -> Path:
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    return Path(path).absolute()


def check_codec(codec: CodecOptions, questions: Sequence[Question]) -> None:
    """Refuse a codec without a folder that these questions need.

    Raises:
        ValueError: a folder is missing; the message names the flag.
    """
    if codec.audio_tokenizer_path is None and any(question.conversation.audios for question in questions):
        raise ValueError(
            f"--audio_tokenizer_path: the {codec.audio_tokenizer_type} codec needs it for speech input"
        )
    if is_continuous_kind(codec.audio_tokenizer_type) and codec.frontend_path is None:
        raise ValueError(f"--frontend_path: the {codec.audio_tokenizer_type} codec needs SenseVoice's folder")
    speaks = any(question.task != "ASR" for question in questions)
    if codec.audio_tokenizer_type.endswith("glm4voice") and codec.flow_path is None and speaks:
        raise ValueError(f"--flow_path: the {codec.audio_tokenizer_type} codec needs it for speech output")


def warm_up(pipeline: SpeechPipeline, question: Question, options: GenerationOptions) -> None:
    """Run every part once: the first call on a device compiles and allocates and must not be timed."""
    short = replace(options, max_new_tokens=16)
    for streaming in (False, True):
        ask(pipeline, question, short, streaming)
    if question.task != "ASR":
        codes = [0] * 8
        pipeline.codec.decode(codes)
        pipeline.codec.stream().push(codes, last=True)


def answer(
    pipeline: SpeechPipeline,
    question: Question,
    options: GenerationOptions,
    streaming: bool,
    console: Console,
) -> Reply:
    """Send a request, and show the reply as it arrives."""
    how = "streaming" if streaming else "whole"
    console.print(f"[bold]{question.name}[/bold] · {options.mode or 'the model’s mode'} · {how}: ", end="")
    reply = ask(pipeline, question, options, streaming, console)
    if not streaming:
        console.print(reply.text, markup=False, highlight=False, end="")
    console.print()
    return reply


def ask(
    pipeline: SpeechPipeline,
    question: Question,
    options: GenerationOptions,
    streaming: bool,
    console: Console | None = None,
) -> Reply:
    if not streaming:
        return pipeline.reply(question.conversation, options)
    for event in pipeline.stream(question.conversation, options):
        if isinstance(event, Reply):
            return event
        if console is None:
            continue
        if isinstance(event, TextDelta):
            console.print(event.text, end="", markup=False, highlight=False)
        else:
            console.print("♪", end="", style="cyan")
    raise RuntimeError("the stream ended without a reply")


def write(reply: Reply, question: Question, streaming: bool, folder: Path) -> dict[str, Any]:
    """Save the speech and return the record, which names the file, or None without speech."""
    options = reply.options.to_dict()
    name = None
    if reply.waveform is not None and len(reply.waveform):
        mode = options["mode"].replace(" ", "-")
        name = f"{question.name}_{mode}{'_stream' if streaming else ''}.wav"
        save_audio(folder / name, reply.waveform, reply.sample_rate)
    return {
        "name": question.name,
        "task": question.task,
        "mode": options["mode"],
        "streaming": streaming,
        "options": options,
        "system": reply.system,
        "question": [
            {"role": message.role, "content": message.content} for message in question.conversation.messages
        ],
        "audios": [str(audio) for audio in question.conversation.audios],
        "text": reply.text,
        "codes": reply.codes,
        "wav": name,
        "timings": asdict(reply.timings) | {"tokens_per_second": reply.timings.tokens_per_second},
    }


def new_table() -> Table:
    """A table with a row for each reply; readable in 80 columns."""
    table = Table(
        title="replies", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False,
        caption="chunk, sound: ms to the first chunk of codes and to the first sound; ~ streaming",
    )  # fmt: skip
    table.add_column("request", overflow="fold", max_width=26)
    table.add_column("mode", overflow="fold", max_width=11)
    table.add_column("text", overflow="fold")
    for column in ("s", "chunk", "sound", "tok/s"):
        table.add_column(column, justify="right", no_wrap=True)
    return table


def add_row(table: Table, question: Question, streaming: bool, reply: Reply) -> None:
    timings = reply.timings
    seconds = 0 if reply.waveform is None else len(reply.waveform) / reply.sample_rate
    whole = timings.total if reply.codes else None
    table.add_row(
        question.name,
        f"{reply.options.schedule.name}{' ~' if streaming else ''}",
        reply.text.strip(),
        f"{seconds:.1f}",
        milliseconds(timings.first_chunk),
        milliseconds(timings.first_sound if streaming else whole),
        f"{timings.tokens_per_second:.0f}",
    )


def milliseconds(seconds: float | None) -> str:
    return "–" if seconds is None else f"{1000 * seconds:.0f}"
