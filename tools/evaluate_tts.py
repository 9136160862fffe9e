"""Speech synthesis scores of one checkpoint: what a recogniser hears in its speech.

    python tools/evaluate_tts.py --model_name_or_path DIR --audio_tokenizer_path DIR \\
        --json_path test_tts.jsonl --grammar digits.gram --output_dir out

Writes ``tts.jsonl``, the WAV files, and ``tts_scores.json``, in which the codec's floor stands
beside the WER. ``--metric seed-tts-zh`` and ``seed-tts-en`` give the Seed-TTS figure instead.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pipeline_arguments import (
    add_codec_arguments,
    add_generation_arguments,
    add_model_arguments,
    add_test_set_arguments,
    add_transcriber_arguments,
    generation_options,
    open_pipeline,
    report,
    run,
    transcriber_pool,
)
from vita_audio.evaluation.benchmark import Listener, read_test_set, write_utterances
from vita_audio.evaluation.tts import run_codec_floor, run_tts, score_codec_floor, score_seed_tts, score_tts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json_path", type=Path, required=True, metavar="FILE", help="JSON-lines test set")
    parser.add_argument("--metric", default="wer", choices=("wer", "seed-tts-zh", "seed-tts-en"))
    parser.add_argument(
        "--floor", action=argparse.BooleanOptionalAction, default=True, help="score the codec alone too"
    )
    add_model_arguments(parser)
    add_codec_arguments(parser)
    add_generation_arguments(parser)
    add_test_set_arguments(parser)
    add_transcriber_arguments(parser)
    args = parser.parse_args()

    items = read_test_set(args.json_path, args.data_root, args.limit)
    pipeline = open_pipeline(args)
    with transcriber_pool(args) as pool:
        listener = Listener(pipeline.codec, pool)
        utterances = run_tts(
            pipeline, items, generation_options(args), listener, args.output_dir, args.batch_size
        )
        write_utterances(args.output_dir / "tts.jsonl", utterances)
        if args.metric == "wer":
            scores = score_tts(utterances)
            if args.floor:
                scores |= score_codec_floor(
                    *run_codec_floor(pipeline.codec, items, listener, args.output_dir)
                )
        else:
            scores = score_seed_tts(utterances, args.metric.removeprefix("seed-tts-"))
    report("tts", scores, args.output_dir)


if __name__ == "__main__":
    run(main)
