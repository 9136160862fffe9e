"""Speech recognition scores of one checkpoint: WER and CER of the text it writes.

    python tools/evaluate_asr.py --model_name_or_path DIR --audio_tokenizer_path DIR \\
        --json_path test_asr.jsonl --output_dir out        # or under torchrun, on several GPUs

Writes ``asr.jsonl`` (reference and hypothesis of each utterance) and ``asr_scores.json``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pipeline_arguments import (
    add_codec_arguments,
    add_generation_arguments,
    add_model_arguments,
    add_test_set_arguments,
    generation_options,
    open_pipeline,
    report,
    run,
)
from vita_audio.evaluation.asr import run_asr, score_asr
from vita_audio.evaluation.benchmark import read_test_set, write_utterances


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json_path", type=Path, required=True, metavar="FILE", help="JSON-lines test set")
    add_model_arguments(parser)
    add_codec_arguments(parser)
    add_generation_arguments(parser)
    add_test_set_arguments(parser)
    args = parser.parse_args()

    items = read_test_set(args.json_path, args.data_root, args.limit)
    utterances = run_asr(open_pipeline(args), items, generation_options(args), args.batch_size)
    write_utterances(args.output_dir / "asr.jsonl", utterances)
    report("asr", score_asr(utterances), args.output_dir)


if __name__ == "__main__":
    run(main)
