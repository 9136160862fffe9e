"""The score table of several checkpoints and modes, in one process or under torchrun.

    python tools/evaluate_table.py --checkpoints stage1=DIR stage3=DIR --modes vanilla boost turbo \\
        --asr test_asr.jsonl --tts test_tts.jsonl --sqa test_sqa.jsonl --output_dir out

One row per checkpoint and mode; a checkpoint shows the modes its heads suffice for, or those named
behind its folder: ``stage2=DIR@vanilla,1-1``. Each row is written to ``scores.json`` and
``scores.md`` as soon as it is known, and not computed again unless something behind it changed.
``OUTPUT_DIR/STAGE-MODE/`` holds every utterance and its WAV file.
"""

from __future__ import annotations

import argparse
import gc
from dataclasses import replace
from itertools import groupby
from operator import itemgetter
from pathlib import Path

from pipeline_arguments import (
    add_codec_arguments,
    add_runtime_arguments,
    add_system_prompt_argument,
    add_test_set_arguments,
    add_transcriber_arguments,
    open_pipeline,
    run,
    system_prompt,
    transcriber_pool,
)
from tqdm import tqdm
from transformers import AutoConfig
from vita_audio.evaluation.benchmark import (
    SPOKEN_REPLY_TOKENS,
    BenchmarkItem,
    Listener,
    read_test_set,
)
from vita_audio.evaluation.table import (
    BenchmarkSets,
    Row,
    Table,
    measure_speed,
    score_floor,
    score_row,
)

import vita_audio.models  # noqa: F401  (registers the model types)
from vita_audio import distributed
from vita_audio.inference import Schedule, SpeechPipeline
from vita_audio.models.schedule import schedules_for


def main() -> None:
    args = parse_args()
    checkpoints = [read_checkpoint(text, args.modes) for text in args.checkpoints]
    sets = BenchmarkSets(
        asr=read_sets(args.asr, args),
        tts=read_sets(args.tts, args),
        sqa=read_sets(args.sqa, args, system_prompt(args)),
    )
    if not (sets.asr or sets.tts or sets.sqa):
        raise ValueError("nothing to score: give --asr, --tts or --sqa")
    settings = {
        name: value
        for name, value in vars(args).items()
        if name not in ("checkpoints", "modes", "output_dir", "transcriber_processes")
    }
    table = Table.open(args.output_dir, settings)
    todo = [
        (stage, folder, mode, table.fingerprint(folder))
        for stage, folder, modes in checkpoints
        for mode in modes
    ]
    keys = [(stage, mode) for stage, _, mode, _ in todo]
    table.keep_only(keys)
    missing = [row for row in todo if table.find(row[0], row[2], row[3]) is None]
    if missing:
        with transcriber_pool(args) as pool:
            fill(table, missing, sets, pool, args)
    table.keep_only(keys)
    table.write()


def fill(table: Table, missing: list, sets: BenchmarkSets, pool, args: argparse.Namespace) -> None:
    """Score the rows that are not there yet; a checkpoint is loaded once for all its modes."""
    listener, floor = None, {}
    with tqdm(total=len(missing), desc="rows", unit="row", disable=not distributed.is_first()) as progress:
        for (stage, folder), group in groupby(missing, key=itemgetter(0, 1)):
            rows = list(group)
            gc.collect()  # the old model leaves before the new one comes
            pipeline = open_pipeline(args, folder)
            if listener is None:
                listener = Listener(pipeline.codec, pool)
                if sets.tts:
                    floor = score_floor(pipeline.codec, sets.tts, listener, args.output_dir, table.settings)
            progress.set_postfix_str(f"{stage} speed")
            speeds = measure_speeds(pipeline, sets, [mode for _, _, mode, _ in rows], args)
            for _, _, mode, fingerprint in rows:
                progress.set_postfix_str(f"{stage} {mode}")
                utterances = args.output_dir / f"{stage}-{mode.replace(' ', '-')}"
                row = score_row(
                    pipeline, sets, listener, utterances, stage, mode,
                    batch_size=args.batch_size, max_new_tokens=args.max_new_tokens,
                )  # fmt: skip
                facts = {"fingerprint": fingerprint, "checkpoint": str(folder)}
                table.put(row | speeds.get(mode, {}) | floor | facts)
                progress.update()
            del pipeline


def measure_speeds(
    pipeline: SpeechPipeline, sets: BenchmarkSets, modes: list[str], args: argparse.Namespace
) -> dict[str, Row]:
    """Speed of each mode, measured by the process that writes the table."""
    spoken = sets.tts or sets.sqa
    if not spoken or not args.speed_items or not distributed.is_first():
        return {}
    return measure_speed(pipeline, spoken[: args.speed_items + 1], modes, max_new_tokens=args.max_new_tokens)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoints", nargs="+", required=True, metavar="STAGE=DIR[@MODE,…]")
    parser.add_argument(
        "--modes", nargs="+", default=["vanilla", "balance", "boost", "turbo"], metavar="MODE",
        help="names, or numbers joined by dashes such as 1-10-4-10 (default: the four of the paper)",
    )  # fmt: skip
    for task in ("asr", "tts", "sqa"):
        parser.add_argument(
            f"--{task}", nargs="+", type=Path, default=[], metavar="FILE", help="JSON-lines test sets"
        )
    parser.add_argument(
        "--max_new_tokens", type=int, default=SPOKEN_REPLY_TOKENS, metavar="N",
        help=f"longest reply (default: {SPOKEN_REPLY_TOKENS})",
    )  # fmt: skip
    parser.add_argument("--speed_items", type=int, default=5, metavar="N", help="replies timed (default: 5)")
    add_system_prompt_argument(parser, default="omni")
    add_runtime_arguments(parser)
    add_codec_arguments(parser)
    add_test_set_arguments(parser)
    add_transcriber_arguments(parser)
    return parser.parse_args()


def read_checkpoint(text: str, modes: list[str]) -> tuple[str, Path, list[str]]:
    """``STAGE=DIR[@MODE,…]`` to its parts, the modes that its heads suffice for filled in."""
    stage, separator, rest = text.partition("=")
    folder, _, chosen = rest.partition("@")
    if not separator or not stage or not folder:
        raise ValueError(f"--checkpoints {text}: write STAGE=DIR")
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"{folder}: no config.json; is the {stage} checkpoint there?")
    heads = getattr(AutoConfig.from_pretrained(folder), "num_nextn_predict_layers", 0)
    names = [mode.replace("-", " ") for mode in (chosen.split(",") if chosen else modes)]
    for name in names:
        Schedule.parse(name)
    return stage, Path(folder), names if chosen else schedules_for(heads, names)


def read_sets(
    paths: list[Path], args: argparse.Namespace, default_system: str | None = None
) -> list[BenchmarkItem]:
    """The items of all files; of several, each id begins with its file's name, so that ids stay apart."""
    items: dict[str, BenchmarkItem] = {}
    for path in paths:
        for item in read_test_set(path, args.data_root, args.limit, default_system):
            name = f"{path.stem}_{item.id}" if len(paths) > 1 else item.id
            if name in items:
                raise ValueError(f"{path}: id {name!r} occurs twice; give the test sets different file names")
            items[name] = replace(item, id=name)
    return list(items.values())


if __name__ == "__main__":
    run(main)
