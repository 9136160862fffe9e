"""Make a small, untrained SenseVoice folder, for training the Plus family from scratch.

    python tools/quickstart/make_sensevoice.py --corpus corpus --out sensevoice
    python tools/quickstart/make_sensevoice.py --data a.jsonl b.jsonl --out sensevoice

writes ``model.safetensors``, ``config.json`` and an ``am.mvn`` estimated from the clips of
the training data. The released Plus models use SenseVoiceSmall instead, whose folder has the same parts. An
untrained encoder has to be trained with the model: ``--audio_model_freeze False``.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from corpus_files import add_source, clips, training_files
from tqdm import tqdm

from vita_audio.audio.sensevoice import SenseVoiceEncoder, SenseVoiceEncoderConfig
from vita_audio.audio.sensevoice.frontend import estimate_cmvn, write_cmvn
from vita_audio.cli.arguments import command_parser, run_command


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    chosen = clips(args.data or training_files(args.corpus))
    random.Random(args.seed).shuffle(chosen)
    shift, scale = estimate_cmvn(tqdm(chosen[: args.max_clips], desc="normalisation", unit="clip"))
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
    print(f"{args.out}: {parameters:,} parameters, normalised on {min(len(chosen), args.max_clips)} clips")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add_source(parser)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--output_size", type=int, default=128, help="width of the encoder")
    parser.add_argument("--attention_heads", type=int, default=4)
    parser.add_argument("--linear_units", type=int, default=256, help="width inside the feed-forward layers")
    parser.add_argument("--num_blocks", type=int, default=3)
    parser.add_argument("--tp_blocks", type=int, default=1)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument(
        "--ctc_vocab_size", type=int, default=32, help="vocabulary size of the unused CTC layer"
    )
    parser.add_argument(
        "--max_clips", type=int, default=500, help="number of clips used for the normalisation"
    )
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main)
