"""Fit the embedded codec mel_vq on the audio of a corpus.

    python tools/fit_mel_vq.py --corpus corpus --out codec
    python tools/fit_mel_vq.py --data a.jsonl b.jsonl --out codec

Every clip named in the JSON lines is used once (or a random part of them, ``--max-clips``): in a corpus folder,
those of ``*_train.jsonl``. The result is a folder for ``--audio_tokenizer_type mel_vq --audio_tokenizer_path
codec``. A minute on two cores for 6,000 short clips.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

from tqdm import tqdm

from vita_audio.audio import AudioError
from vita_audio.audio.mel_vq import MelVQConfig, MelVQTokenizer


def main() -> None:
    defaults = MelVQConfig()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--corpus", type=Path, metavar="DIR", help="folder with *_train.jsonl")
    source.add_argument("--data", type=Path, nargs="+", metavar="JSONL", help="files in the training format")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--codes", type=int, default=defaults.codebook_size, metavar="N")
    parser.add_argument("--epochs", type=int, default=10, metavar="N", help="passes of the k-means")
    parser.add_argument(
        "--max-clips", type=int, metavar="N", help="listen to so many clips, chosen at random"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.max_clips is not None and args.max_clips < 1:
        parser.error(f"--max-clips {args.max_clips}: give 1 or more")

    files = args.data or sorted(args.corpus.glob("*_train.jsonl"))
    if not files:
        raise ValueError(f"{args.corpus}: no *_train.jsonl there; tools/make_spoken_arithmetic.py makes them")
    clips = audio_paths(files)
    if not clips:
        raise ValueError(f"{', '.join(map(str, files))}: no audio in any sample")
    if args.max_clips is not None and args.max_clips < len(clips):
        clips = random.Random(args.seed).sample(clips, args.max_clips)
    with tqdm(total=args.epochs, desc="k-means", unit="epoch") as epochs:
        codec = MelVQTokenizer.fit(
            tqdm(clips, desc="listening", unit="clip"),
            MelVQConfig(codebook_size=args.codes),
            seed=args.seed,
            epochs=args.epochs,
            on_epoch=lambda epoch: epochs.update(epoch - epochs.n),
        )
    codec.save_pretrained(args.out)
    print(f"{codec.codebook_size} codes from {len(clips)} clips in {args.out}, {codec.fingerprint}")


def audio_paths(files: list[Path]) -> list[Path]:
    """Every audio file named in the samples, once; relative paths start at the JSON's folder."""
    paths: dict[Path, None] = {}
    for file in files:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    audios = json.loads(line).get("audios") or [] if line.strip() else []
                    paths.update(dict.fromkeys(file.parent / audio for audio in audios))
                except (json.JSONDecodeError, AttributeError, TypeError) as error:
                    raise ValueError(f"{file}:{number}: not a sample: {error}") from error
    return list(paths)


if __name__ == "__main__":
    try:
        main()
    except (AudioError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
