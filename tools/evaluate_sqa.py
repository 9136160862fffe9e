"""Speech-QA scores of one checkpoint: is the answer in its text (S→T) and in its speech (S→S)?

    python tools/evaluate_sqa.py --model_name_or_path DIR --audio_tokenizer_path DIR \\
        --json_path test_sqa.jsonl --transcriber whisper --transcriber_path DIR --output_dir out

Writes ``sqa.jsonl``, the WAV files, and ``sqa_scores.json``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pipeline_arguments import (
    add_codec_arguments,
    add_generation_arguments,
    add_model_arguments,
    add_system_prompt_argument,
    add_test_set_arguments,
    add_transcriber_arguments,
    generation_options,
    open_pipeline,
    report,
    run,
    system_prompt,
    transcriber_pool,
)
from vita_audio.evaluation.benchmark import Listener, read_test_set, write_utterances
from vita_audio.evaluation.sqa import run_sqa, score_sqa


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json_path", type=Path, required=True, metavar="FILE", help="JSON-lines test set")
    add_system_prompt_argument(parser, default="omni")
    add_model_arguments(parser)
    add_codec_arguments(parser)
    add_generation_arguments(parser)
    add_test_set_arguments(parser)
    add_transcriber_arguments(parser)
    args = parser.parse_args()

    items = read_test_set(args.json_path, args.data_root, args.limit, system_prompt(args))
    pipeline = open_pipeline(args)
    with transcriber_pool(args) as pool:
        listener = Listener(pipeline.codec, pool)
        utterances = run_sqa(
            pipeline, items, generation_options(args), listener, args.output_dir, args.batch_size
        )
    write_utterances(args.output_dir / "sqa.jsonl", utterances)
    report("sqa", score_sqa(utterances), args.output_dir)


if __name__ == "__main__":
    run(main)
