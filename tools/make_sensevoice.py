"""Make a small, untrained SenseVoice folder, for training the Plus family from scratch.

    python tools/make_sensevoice.py --corpus corpus --out sensevoice
    python tools/make_sensevoice.py --data a.jsonl b.jsonl --out sensevoice

writes ``model.safetensors``, ``config.json`` and an ``am.mvn`` estimated from the clips of
the training data. The released Plus models use SenseVoiceSmall instead, whose folder has the same parts. An
untrained encoder has to be trained with the model: ``--audio_model_freeze False``.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

import torch
from fit_mel_vq import audio_paths
from tqdm import tqdm

from vita_audio.audio.sensevoice import SenseVoiceEncoder, SenseVoiceEncoderConfig
from vita_audio.audio.sensevoice.frontend import estimate_cmvn, write_cmvn


def main() -> None:
    args = parse_args()
    files = args.data or sorted(args.corpus.glob("*_train.jsonl"))
    clips = audio_paths(files)
    if not clips:
        raise ValueError(f"{args.corpus or ', '.join(map(str, files))}: no *_train.jsonl that names audio")
    random.Random(args.seed).shuffle(clips)
    shift, scale = estimate_cmvn(tqdm(clips[: args.max_clips], desc="normalisation", unit="clip"))
    torch.manual_seed(args.seed)
    encoder = SenseVoiceEncoder(
        SenseVoiceEncoderConfig(
            output_size=args.output_size,
            attention_heads=args.attention_heads,
            linear_units=args.linear_units,
            num_blocks=args.num_blocks,
            tp_blocks=args.tp_blocks,
            dropout_rate=args.dropout,
            positional_dropout_rate=args.dropout,
            attention_dropout_rate=args.dropout,
            ctc_vocab_size=args.ctc_vocab_size,
        )
    )
    encoder.save_pretrained(args.out)
    write_cmvn(args.out / "am.mvn", shift, scale)
    parameters = sum(parameter.numel() for parameter in encoder.parameters())
    print(f"{args.out}: {parameters:,} parameters, normalised on {min(len(clips), args.max_clips)} clips")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--corpus", type=Path, metavar="DIR", help="folder with *_train.jsonl")
    source.add_argument("--data", type=Path, nargs="+", metavar="JSONL", help="files in the training format")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--output-size", type=int, default=128, help="width of the encoder")
    parser.add_argument("--attention-heads", type=int, default=4)
    parser.add_argument("--linear-units", type=int, default=256, help="width inside the feed-forward layers")
    parser.add_argument("--num-blocks", type=int, default=3)
    parser.add_argument("--tp-blocks", type=int, default=1)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--ctc-vocab-size", type=int, default=32, help="of the unused CTC layer")
    parser.add_argument("--max-clips", type=int, default=500, help="clips that the normalisation looks at")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
