"""A folder of recordings of one voice, each with its transcript beside it, for docs/own_voice.md.

    python tools/quickstart/make_voice.py --out recordings --voice en-us+john --words_per_minute 140 --pitch 40

The sentences are digit strings, as the quickstart's model has learned to read them aloud.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import soundfile
import soxr
from espeak import Voice, open_synthesiser
from make_spoken_arithmetic import SAMPLE_RATE, Clip, digit_strings, in_a_room

from vita_audio.cli.arguments import command_parser, run_command
from vita_audio.files import whole_file, write_text


def main(argv: Sequence[str] | None = None) -> None:
    parser = command_parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--voice", default="en-us+john", help="name in espeak-ng: language and variant")
    parser.add_argument("--words_per_minute", type=int, default=140)
    parser.add_argument("--pitch", type=int, default=40)
    parser.add_argument("--clips", type=int, default=480)
    parser.add_argument("--seed", type=int, default=17)
    options = parser.parse_args(argv)
    voice = Voice(options.voice, options.words_per_minute, options.pitch)
    synthesiser, strings = open_synthesiser(), digit_strings(random.Random(options.seed))
    for number in range(options.clips):
        text = next(strings)
        clip = Clip(text, voice)
        waveform = soxr.resample(synthesiser.speak(text, voice), synthesiser.sample_rate, SAMPLE_RATE)
        with whole_file(options.out / f"{number:04d}.wav") as temporary:
            soundfile.write(
                temporary, in_a_room(waveform, clip.key), SAMPLE_RATE, format="WAV", subtype="PCM_16"
            )
        write_text(options.out / f"{number:04d}.txt", f"{text}\n")
    print(f"{options.clips} recordings in {options.out}")


if __name__ == "__main__":
    run_command(main)
