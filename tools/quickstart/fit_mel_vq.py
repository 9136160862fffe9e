"""Fit the embedded codec mel_vq on the audio of a corpus.

    python tools/quickstart/fit_mel_vq.py --corpus corpus --out codec
    python tools/quickstart/fit_mel_vq.py --data a.jsonl b.jsonl --out codec

Every clip named in the JSON lines is used once, or a random subset of them (``--max_clips``). In a corpus folder,
these are the clips of ``*_train.jsonl``. The result is a folder for ``--audio_tokenizer_type mel_vq
--audio_tokenizer_path codec``. It takes a minute on two cores for 6,000 short clips.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from corpus_files import add_source, clips, training_files
from tqdm import tqdm

from vita_audio.audio.mel_vq import MelVQConfig, MelVQTokenizer
from vita_audio.cli.arguments import command_parser, run_command


def main(argv: Sequence[str] | None = None) -> None:
    parser = command_parser(__doc__)
    add_source(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--codes", type=int, default=MelVQConfig().codebook_size, metavar="N")
    parser.add_argument("--epochs", type=int, default=10, metavar="N", help="passes of the k-means")
    parser.add_argument("--max_clips", type=int, metavar="N", help="use N clips, chosen at random")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.max_clips is not None and args.max_clips < 1:
        parser.error(f"--max_clips {args.max_clips}: give 1 or more")

    chosen = clips(args.data or training_files(args.corpus))
    if args.max_clips is not None and args.max_clips < len(chosen):
        chosen = random.Random(args.seed).sample(chosen, args.max_clips)
    with tqdm(total=args.epochs, desc="k-means", unit="epoch") as epochs:
        codec = MelVQTokenizer.fit(
            tqdm(chosen, desc="listening", unit="clip"),
            MelVQConfig(codebook_size=args.codes),
            seed=args.seed,
            epochs=args.epochs,
            on_epoch=lambda epoch: epochs.update(epoch - epochs.n),
        )
    codec.save_pretrained(args.out)
    print(f"{codec.codebook_size} codes from {len(chosen)} clips in {args.out}, {codec.fingerprint}")


if __name__ == "__main__":
    run_command(main)
