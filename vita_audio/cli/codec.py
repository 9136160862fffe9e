"""Run a speech codec: encode, decode, round-trip, stream.

    python tools/codec.py encode speech.wav --tokenizer glm-4-voice-tokenizer --output codes.json
    python tools/codec.py decode codes.json --flow glm-4-voice-decoder --output speech.wav
    python tools/codec.py round-trip speech.wav --tokenizer ... --flow ... --output again.wav
    python tools/codec.py stream codes.json --flow ... --output speech.wav

Codes are JSON lists, one per clip. Each command prints its real-time factor: seconds of computation per second
of speech; below 1 is faster than real time. ``stream`` also prints the time of every chunk.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from vita_audio.audio import AudioTokenizer, audio_duration, get_audio_tokenizer, save_audio
from vita_audio.cli.arguments import CODEC, command_parser
from vita_audio.files import read_json, write_json
from vita_audio.inference.pipeline import default_device
from vita_audio.models.open import check_device

CODEC_FLAGS = replace(
    CODEC,
    names={
        "audio_tokenizer_type": ("audio_tokenizer_type", "tokenizer_type"),
        "audio_tokenizer_path": ("audio_tokenizer_path", "tokenizer"),
        "flow_path": ("flow_path", "flow"),
    },
    left_out=("frontend_path",),
)

console = Console(stderr=True)  # standard output is for codes


def main(argv: Sequence[str] | None = None) -> None:
    """Run one of the four commands.

    Raises:
        ValueError: a folder, file or device cannot be used; the message is one line.
    """
    arguments = _parse(argv)
    arguments.device = check_device(arguments.device or default_device())
    arguments.run(_open(arguments), arguments)


def encode(codec: AudioTokenizer, arguments: argparse.Namespace) -> None:
    """Audio files to a JSON list of code lists; with ``--compare_bf16``, the share of codes equal in bfloat16."""
    seconds = sum(map(audio_duration, arguments.inputs))
    codec.encode((torch.zeros(1600), 16000))  # loads the weights, which are excluded from the timing
    start = time.perf_counter()
    codes = codec.encode_batch(arguments.inputs)
    _report("encode", time.perf_counter() - start, seconds, sum(map(len, codes)))
    if arguments.compare_bf16:
        low = _open_low_precision(arguments).encode_batch(arguments.inputs)
        pairs = [pair for full, half in zip(codes, low, strict=True) for pair in zip(full, half, strict=True)]
        kept = sum(full == half for full, half in pairs)
        console.print(f"bfloat16 agrees on {kept} of {len(pairs)} codes ({kept / max(1, len(pairs)):.2%})")
    if arguments.output is None:
        print(json.dumps(codes))
    else:
        write_json(arguments.output, codes, indent=None)


def decode(codec: AudioTokenizer, arguments: argparse.Namespace) -> None:
    """Codes to an audio file, in one piece."""
    codes = _read_codes(arguments.inputs[0])
    codec.decode(codes[:1], steps=1)
    _decode(codec, codes, arguments)


def round_trip(codec: AudioTokenizer, arguments: argparse.Namespace) -> None:
    """Audio to codes to audio."""
    seconds = audio_duration(arguments.inputs[0])
    codec.decode(codec.encode((torch.zeros(1600), 16000)), steps=1)
    start = time.perf_counter()
    codes = codec.encode(arguments.inputs[0])
    _report("encode", time.perf_counter() - start, seconds, len(codes))
    _decode(codec, codes, arguments)


def stream(codec: AudioTokenizer, arguments: argparse.Namespace) -> None:
    """Codes to audio as a stream, ``--piece`` codes at a time."""
    codes = _read_codes(arguments.inputs[0])
    codec.decode(codes[:1], steps=1)
    reply = codec.stream(_generator(arguments))
    table = Table("codes so far", "speech out (s)", "chunk time (s)", "real-time factor")
    waves, work = [], 0.0
    for begin in range(0, len(codes), arguments.piece):
        end = min(begin + arguments.piece, len(codes))
        start = time.perf_counter()
        wave = reply.push(codes[begin:end], last=end == len(codes))
        elapsed = time.perf_counter() - start
        work += elapsed
        waves.append(wave)
        if len(wave):
            spoken = len(wave) / codec.sample_rate
            table.add_row(str(end), f"{spoken:.2f}", f"{elapsed:.3f}", f"{elapsed / spoken:.2f}")
    console.print(table)
    waveform = torch.cat(waves)
    _report("stream", work, len(waveform) / codec.sample_rate, len(codes))
    save_audio(arguments.output, waveform, codec.sample_rate)


def _decode(codec: AudioTokenizer, codes: list[int], arguments: argparse.Namespace) -> None:
    start = time.perf_counter()
    waveform = codec.decode(codes, steps=arguments.steps, generator=_generator(arguments))
    elapsed = time.perf_counter() - start
    _report(f"decode, {arguments.steps} steps", elapsed, len(waveform) / codec.sample_rate, len(codes))
    save_audio(arguments.output, waveform, codec.sample_rate)


def _report(what: str, work: float, speech: float, codes: int) -> None:
    factor = work / speech if speech else float("nan")
    console.print(
        f"{what}: {codes} codes, {speech:.2f} s of speech in {work:.2f} s, real-time factor {factor:.3f}"
    )


def _read_codes(path: Path) -> list[int]:
    """One list of codes, or the first of several."""
    codes = read_json(path)
    if isinstance(codes, list) and codes and isinstance(codes[0], list):
        codes = codes[0]
    if not isinstance(codes, list) or not codes or not all(type(code) is int for code in codes):
        raise ValueError(f"{path}: expected a non-empty JSON list of codes")
    return codes


def _generator(arguments: argparse.Namespace) -> torch.Generator | None:
    return None if arguments.seed is None else torch.Generator().manual_seed(arguments.seed)


def _open(arguments: argparse.Namespace) -> AudioTokenizer:
    """The codec; decoding needs only the decoder's folder."""
    options = CODEC_FLAGS.read(arguments)
    return get_audio_tokenizer(
        options.audio_tokenizer_type,
        options.audio_tokenizer_path,
        flow_path=options.flow_path,
        device=str(arguments.device),
    )


def _open_low_precision(arguments: argparse.Namespace) -> AudioTokenizer:
    options = CODEC_FLAGS.read(arguments)
    if options.audio_tokenizer_type != "glm4voice":
        raise ValueError(f"--compare_bf16: the {options.audio_tokenizer_type} codec has one precision only")
    from vita_audio.audio.glm4voice import GLM4VoiceTokenizer

    return GLM4VoiceTokenizer.from_pretrained(
        options.audio_tokenizer_path, device=arguments.device, encoder_dtype=torch.bfloat16
    )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, run in (("encode", encode), ("decode", decode), ("round-trip", round_trip), ("stream", stream)):
        command = commands.add_parser(name, help=run.__doc__)
        command.set_defaults(run=run)
        several = name == "encode"
        command.add_argument("inputs", type=Path, nargs="+" if several else 1, help="audio or codes (JSON)")
        command.add_argument("--output", type=Path, required=not several, help="file to write")
        CODEC_FLAGS.add_to(command)
        command.add_argument("--device", help="default: this process's GPU, else the CPU")
        if several:
            command.add_argument(
                "--compare_bf16", action="store_true", help="print the agreement with bfloat16"
            )
        else:
            command.add_argument("--steps", type=int, default=10, help="solver steps")
            command.add_argument("--seed", type=int, help="seed of the decoder's noise")
        if name == "stream":
            command.add_argument("--piece", type=int, default=10, help="number of codes pushed at a time")
    return parser.parse_args(argv)
