"""Score checkpoints on test sets, in one process or under torchrun.

    python tools/evaluate_table.py --checkpoints stage1=DIR stage3=DIR --modes vanilla boost turbo \\
        --asr asr.jsonl --tts tts.jsonl --sqa sqa.jsonl --text_qa text_qa.jsonl --seed_tts zh/meta.lst --output_dir out

One row per checkpoint and mode. A checkpoint is scored in the modes that it has enough heads for, or in those
listed after its folder: stage2=DIR@vanilla,1-1. Every test set has its own scores, named by NAME=FILE, else by file.
--benchmarks takes the paper's benchmarks by name, "paper" for those that are there, and YAML files in the same form
(configs/benchmarks/). results.json, results.md and results.html are written row by row, and a score is computed
again only if one of its inputs changed. A killed run goes on where it was. OUTPUT_DIR/STAGE-MODE/ holds every
utterance and its WAV file, OUTPUT_DIR/run.json the settings of the run. Items that fail are named and not scored; the
exit status is then 1.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from transformers import GenerationConfig

from vita_audio.chat import default_data_root, locate_file
from vita_audio.cli.arguments import (
    CODEC,
    GENERATION,
    RUNTIME,
    CommandParser,
    add_system_prompt,
    command_parser,
    transcriber_group,
)
from vita_audio.distributed import is_first
from vita_audio.evaluation.benchmarks import Benchmark, choose
from vita_audio.evaluation.evaluate import evaluate
from vita_audio.evaluation.items import PLAIN_NAME, file_name
from vita_audio.evaluation.modes import TRADEOFF, modes_for, needs_engine
from vita_audio.evaluation.normalisers import NORMALISERS, normaliser
from vita_audio.evaluation.preparation import prepared_checksum
from vita_audio.evaluation.quality import QUALITY_MODELS
from vita_audio.evaluation.results import folder_fingerprint
from vita_audio.evaluation.scoreboard import TASKS, Row, markdown
from vita_audio.evaluation.settings import DECODINGS, BenchmarkSet, Checkpoint, Settings, check
from vita_audio.evaluation.similarity import SPEAKER_MODELS, SpeakerConfig
from vita_audio.evaluation.tasks import SeedTTS, SpeechRecognition, SpeechSynthesis, Task
from vita_audio.evaluation.tasks.seed_tts import LANGUAGES, language_of
from vita_audio.evaluation.tasks.tts import Reading
from vita_audio.evaluation.tradeoff import write_tradeoff
from vita_audio.evaluation.transcribers import RECOGNISERS, TranscriberConfig
from vita_audio.files import write_json
from vita_audio.inference import GenerationOptions, SpeechPipeline
from vita_audio.inference.pipeline import check_family, default_device
from vita_audio.models.open import locate, open_config
from vita_audio.models.schedule import SCHEDULES
from vita_audio.provenance import RUN_FILE, describe_run

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> None:
    """Score several checkpoints, modes and test sets, and write the table."""
    parser = command_parser(__doc__)
    parser.add_argument("--checkpoints", nargs="+", required=True, metavar="STAGE=DIR[@MODE,…]")
    parser.add_argument(
        "--modes", nargs="+", metavar="MODE",
        help="names, numbers joined by dashes such as 1-10-4-10, or lossless; MODE+audio_rows and MODE+audio_rows_on "
        "read only the vocabulary's rows of speech (default: the paper's four)",
    )  # fmt: skip
    parser.add_argument(
        "--tradeoff", action="store_true",
        help="quality against speed: also score lossless and audio_rows, and write tradeoff.md, .png and .svg",
    )  # fmt: skip
    for task in TASKS.values():
        parser.add_argument(
            f"--{task.name}", nargs="+", default=[], metavar="[NAME=]FILE", help=f"test sets of {task.title}"
        )
    parser.add_argument(
        "--benchmarks", nargs="+", default=[], metavar="NAME", help="benchmarks, paper, or YAML files"
    )
    parser.add_argument(
        "--root", type=Path, metavar="DIR", help="base folder of the benchmarks' files (default: $ROOT_PATH)"
    )
    parser.add_argument(
        "--decoding", nargs="+", default=[], choices=DECODINGS,
        help="greedy: the most likely token, which is reproducible; published: the decoding of the published figures, "
        "with sampled speech synthesis and the checkpoint's repetition penalty; both may be given (default: that of "
        "each benchmark, greedy for other sets)",
    )  # fmt: skip
    defaults = Settings()
    parser.add_argument(
        "--max_new_tokens",
        type=int,
        default=defaults.max_new_tokens,
        metavar="N",
        help="maximum length of a reply, in tokens",
    )
    parser.add_argument(
        "--seed", type=int, default=defaults.seed, metavar="N", help="seed of sampled replies"
    )
    parser.add_argument(
        "--samples", type=int, default=defaults.samples, metavar="N",
        help="how often sampled replies are drawn; scores are means over the draws (default: 1)",
    )  # fmt: skip
    parser.add_argument(
        "--speed_items", type=int, default=defaults.speed_items, metavar="N",
        help=f"number of timed replies (default: {defaults.speed_items})",
    )  # fmt: skip
    _add_common_arguments(parser)
    args = parser.parse_args(argv)

    args.modes = args.modes or list(TRADEOFF if args.tradeoff else SCHEDULES)
    files = [(task, text) for task in TASKS for text in getattr(args, task)]
    if not files and not args.benchmarks:
        flags = ", ".join(f"--{task}" for task in TASKS)
        raise ValueError(f"nothing to score: give --benchmarks, or one of {flags}")
    checkpoints = [_read_checkpoint(text, args) for text in args.checkpoints]
    sets = [_judged(one, args) for one in (*_read_sets(files, args), *_read_benchmarks(args))]
    twice = [name for name, count in Counter(one.name.lower() for one in sets).items() if count > 1]
    if twice:
        raise ValueError(f"two test sets have the name {twice[0]!r}; give them different names")
    if args.decoding:
        sets = [replace(one, decoding=None) for one in sets]
    decodings = args.decoding or sorted({one.decoding or "greedy" for one in sets})
    settings = replace(
        _settings(args),
        decodings=tuple(dict.fromkeys(decodings)),
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
        samples=args.samples,
        speed_items=args.speed_items,
    )
    _run("evaluate", args, checkpoints, sets, settings)


def main_single(task: str, argv: Sequence[str] | None = None, **defaults: object) -> None:
    """Score one checkpoint on one test set, with any generation options.

    Writes ``TASK.jsonl``, the WAV files and ``TASK_scores.json`` into the output folder.

    Args:
        task: name in :data:`~vita_audio.evaluation.scoreboard.TASKS`.
        defaults: defaults of the command's flags that replace the usual ones.
    """
    parser = command_parser(
        f"{TASKS[task].title} scores of one checkpoint on one test set.\n\n{main_single.__doc__}"
    )
    parser.add_argument(
        "--json_path", "--data_path", dest="json_path", required=True, metavar="FILE", help="test set"
    )
    parser.add_argument("--model_name_or_path", required=True, metavar="DIR", help="checkpoint folder")
    parser.add_argument(
        "--num_workers", type=int, default=0, help=argparse.SUPPRESS
    )  # for the original's commands
    if task == "tts":
        parser.add_argument(
            "--metric", default="wer", choices=("wer", *(f"seed-tts-{language}" for language in LANGUAGES)),
            help="error metric (default: wer)",
        )  # fmt: skip
        parser.add_argument(
            "--floor", action=argparse.BooleanOptionalAction, default=True,
            help="also score the recordings of the test set, unchanged and after the codec (default: --floor)",
        )  # fmt: skip
    GENERATION.add_to(parser, do_sample=TASKS[task].samples, seed=Settings.seed)
    _add_common_arguments(parser)
    parser.set_defaults(**defaults)
    args = parser.parse_args(argv)

    heads = _count_heads(args.model_name_or_path, args.audio_tokenizer_type)
    folder = locate(args.model_name_or_path)
    given = GENERATION.read(args)
    if not given.do_sample:
        given = replace(given, seed=None)
    checkpoint = Checkpoint(folder.name or str(folder), folder, [_resolved_mode(folder, heads, given)])
    settings = replace(
        _settings(args), given=given, max_new_tokens=given.max_new_tokens, speed_items=0, single=True,
        recordings=getattr(args, "floor", True),
    )  # fmt: skip
    name, language = task, None
    if getattr(args, "metric", "wer") != "wer":
        name, language = "seed_tts", args.metric.removeprefix("seed-tts-")
        args.seed_tts_language, args.chinese_transcriber = language, args.transcriber or "pocketsphinx"
        args.chinese_transcriber_path = args.transcriber_path
    sets = [_judged(one, args) for one in _read_sets([(name, f"{task}={args.json_path}")], args)]
    _run(f"evaluate_{task}", args, [checkpoint], sets, settings)


def _run(
    command: str,
    args: argparse.Namespace,
    checkpoints: Sequence[Checkpoint],
    sets: Sequence[BenchmarkSet],
    settings: Settings,
) -> None:
    """Score, then print the table and its path."""
    check(checkpoints, sets, settings)
    if is_first():
        data = {one.name: {"file": str(one.path), "fingerprint": one.fingerprint} for one in sets}
        write_json(args.output_dir / RUN_FILE, describe_run(command, vars(args), data))
    codec, runtime = CODEC.read(args), RUNTIME.read(args)

    def open_pipeline(folder: Path) -> SpeechPipeline:
        return SpeechPipeline.open(folder, codec, runtime)

    rows: list[Row] = evaluate(checkpoints, sets, settings, args.output_dir, open_pipeline)
    if is_first():
        print(f"\n{markdown(rows)}\n{args.output_dir / 'results.md'}", flush=True)
        if getattr(args, "tradeoff", False):
            print(write_tradeoff(args.output_dir, rows), flush=True)
    failed = sum(facts["failed"] for row in rows for facts in row["sets"].values())
    if failed:
        sys.exit(f"error: {failed} items failed (named above); start the command again to try them again")


def _add_common_arguments(parser: CommandParser) -> None:
    group = parser.add_argument_group("test sets")
    group.add_argument("--data_root", type=Path, metavar="DIR", help="base folder of relative audio paths")
    group.add_argument("--limit", type=int, metavar="N", help="at most N items, spread over each file")
    group.add_argument(
        "--batch_size", type=int, default=Settings.batch_size, help="replies generated together"
    )
    group.add_argument("--output_dir", type=Path, required=True, metavar="DIR")
    group.add_argument(
        "--text_normaliser", choices=tuple(NORMALISERS),
        help="normaliser for TTS, and for the columns of ASR that compare words: words compares them without "
        "punctuation, libritts also spells out numbers and abbreviations as in the published LibriTTS figures (needs "
        "WeTextProcessing), whisper and whisper-basic are those of published Whisper figures, for English and other "
        "languages (default: that of the benchmark, else words)",
    )  # fmt: skip
    group.add_argument(
        "--speaker_prompt",
        action="store_true",
        help="Seed-TTS: use the speaker's recording as the voice prompt",
    )
    group.add_argument("--seed_tts_language", choices=LANGUAGES, help="default: from the list's folder")
    add_system_prompt(parser)
    RUNTIME.add_to(parser)
    CODEC.add_to(parser)
    recogniser = replace(transcriber_group(), unset="that of the benchmark, else pocketsphinx")
    recogniser.add_to(parser, name=None)
    group = parser.add_argument_group("listening")
    group.add_argument(
        "--transcriber_processes", type=int, default=Settings.transcriber_processes, metavar="N",
        help="number of recogniser processes; 0 recognises in this process (default: 2)",
    )  # fmt: skip
    group.add_argument(
        "--chinese_transcriber", choices=RECOGNISERS,
        help="recogniser for Mandarin Seed-TTS (default: that of the benchmark, else paraformer)",
    )  # fmt: skip
    group.add_argument("--chinese_transcriber_path", metavar="DIR", help="its weights")
    group.add_argument(
        "--speaker_model", choices=(*SPEAKER_MODELS, "none"),
        help="embedding that compares the model's voice with the voice prompt (default: the benchmark's, else none)",
    )  # fmt: skip
    group.add_argument(
        "--quality_model", choices=(*QUALITY_MODELS, "none"), default="none",
        help="network that judges how natural the speech of TTS and Seed-TTS sounds (default: none)",
    )  # fmt: skip
    group.add_argument("--speaker_model_path", metavar="FILE", help="its weights")


def _settings(args: argparse.Namespace) -> Settings:
    # Scores may depend on these; they do not on the device, nor on the engine, which is exact.
    runtime = vars(RUNTIME.read(args))
    codec = {name: value for name, value in runtime.items() if name not in ("device", "engine")}
    codec["audio_tokenizer_type"] = args.audio_tokenizer_type
    folders = ("audio_tokenizer_path", "flow_path", "frontend_path")
    return Settings(
        batch_size=args.batch_size,
        system_prompt=args.system_prompt,
        transcriber_processes=args.transcriber_processes,
        codec=codec | {name: folder_fingerprint(getattr(args, name)) for name in folders},
    )


def _read_checkpoint(text: str, args: argparse.Namespace) -> Checkpoint:
    """Parse ``STAGE=DIR[@MODE,…]``; the modes default to those that it has enough heads for."""
    stage, separator, rest = text.partition("=")
    folder, _, chosen = rest.partition("@")
    if not separator or not stage or not folder or "/" in stage:
        raise ValueError(f"--checkpoints {text}: write STAGE=DIR, without / in the name of the stage")
    heads = _count_heads(folder, args.audio_tokenizer_type)
    names = [mode.replace("-", " ") for mode in (chosen.split(",") if chosen else args.modes)]
    for name in names:
        if needs_engine(name) and args.engine is False:
            raise ValueError(f"mode {name}: needs the engine; leave out --engine false")
    return Checkpoint(stage, locate(folder), names if chosen else modes_for(heads, names))


def _count_heads(folder: str | Path, audio_tokenizer_type: str) -> int:
    """The number of heads of a checkpoint, after checking that it fits the codec.

    Raises:
        ValueError: it is not a checkpoint of this family, or reads another kind of input.
    """
    config = open_config(folder)
    check_family(config, audio_tokenizer_type)
    return int(config.num_nextn_predict_layers)


def _resolved_mode(folder: Path, heads: int, given: GenerationOptions) -> str:
    """The given mode, else the checkpoint's."""
    stored = folder / "generation_config.json"
    config = GenerationConfig.from_pretrained(folder) if stored.is_file() else GenerationConfig()
    return given.resolved(config, heads).schedule.name


def _read_sets(files: Sequence[tuple[str, str]], args: argparse.Namespace) -> list[BenchmarkSet]:
    """The test sets of pairs of a task and ``[NAME=]FILE``."""
    given = [(task, *_named_file(text, args.data_root)) for task, text in files]
    names = _set_names([(name, path) for _, name, path in given]) if given else []
    sets = []
    for name, (task_name, _, path) in zip(names, given, strict=True):
        task = _task(task_name, path, args)
        items = task.read(path, args.data_root, args.limit)
        sets.append(BenchmarkSet(name, task, path, items, _recogniser(task, args), _speaker(task, args)))
    return sets


def _read_benchmarks(args: argparse.Namespace) -> list[BenchmarkSet]:
    """The test sets of ``--benchmarks``; flags of recogniser and speaker embedding override theirs."""
    root = args.root or Path(os.environ.get("ROOT_PATH", "."))
    chosen, missing = choose(args.benchmarks, root)
    for line in missing if is_first() else ():
        logger.warning("%s", line)
    if args.benchmarks and not chosen:
        raise ValueError(f"no benchmark is below {root}; the first: {missing[0]}")
    return [_benchmark_set(one, root, args) for one in chosen]


def _benchmark_set(one: Benchmark, root: Path, args: argparse.Namespace) -> BenchmarkSet:
    one = replace(one, normaliser=args.text_normaliser or one.normaliser)
    task, path = one.make_task(), one.path(root)
    recogniser, speaker = one.make_recogniser(root), one.make_speaker(root)
    is_chinese = isinstance(task, SeedTTS) and task.language == "zh"
    flags = ("chinese_transcriber",) if is_chinese else ("transcriber", "transcriber_path", "grammar")
    if task.speaks and any(getattr(args, flag) for flag in flags):
        recogniser = _recogniser(task, args)
    if recogniser is not None:
        language = args.language or recogniser.language or one.language
        recogniser = _placed(replace(recogniser, language=language), args)
    if speaker is not None and not args.speaker_model:
        speaker = replace(speaker, device=args.device or default_device())
    else:
        speaker = _speaker(task, args)
    items = task.read(path, args.data_root or root, args.limit)
    prepared = None if args.limit is not None else prepared_checksum(path)
    return BenchmarkSet(
        one.name, task, path, items, recogniser, speaker, None, one.decoding, tuple(one.published), prepared
    )


def _judged(one: BenchmarkSet, args: argparse.Namespace) -> BenchmarkSet:
    """The set with the network of ``--quality_model``, if its task has such a column."""
    if args.quality_model == "none" or not isinstance(one.task, Reading):
        return one
    return replace(one, quality=args.quality_model)


def _named_file(text: str, data_root: Path | None) -> tuple[str, Path]:
    """Name (empty for none) and path of ``[NAME=]FILE``; a missing file is looked up below the data root."""
    name, separator, file = text.partition("=")
    if not separator or Path(text).exists():
        name, file = "", text
    below = locate_file(file, data_root or default_data_root(file), Path.cwd())
    return name, Path(file) if Path(file).exists() or not Path(below).exists() else Path(below)


def _set_names(given: Sequence[tuple[str, Path]]) -> list[str]:
    """A unique name for each set: as given, else the file's name, with as many folders as needed."""
    stems = [name or path.name.partition(".json")[0].removesuffix(".lst") for name, path in given]
    names = list(stems)
    for depth in range(1, max(len(path.resolve().parts) for _, path in given)):
        repeated = {name for name, count in Counter(names).items() if count > 1}
        for index, (chosen, path) in enumerate(given):
            if names[index] in repeated and not chosen:
                names[index] = "_".join([*path.resolve().parts[-1 - depth : -1], stems[index]])
    twice = [path for name, (_, path) in zip(names, given, strict=True) if names.count(name) > 1]
    if twice:
        raise ValueError(
            f"{twice[0]}: two test sets have this name; give them different names with NAME=FILE"
        )
    files = [name if PLAIN_NAME.fullmatch(name) else file_name(name) for name in names]
    return files if len(set(map(str.lower, files))) == len(files) else [file_name(name) for name in names]


def _task(name: str, path: Path, args: argparse.Namespace) -> Task:
    if name == "seed_tts":
        return SeedTTS(language_of(path, args.seed_tts_language), args.speaker_prompt)
    if name in ("tts", "asr"):
        chosen = args.text_normaliser or SpeechSynthesis.text_normaliser
        normaliser(chosen)  # fails here if its package is missing
        return (SpeechSynthesis if name == "tts" else SpeechRecognition)(chosen)
    return TASKS[name]


def _recogniser(task: Task, args: argparse.Namespace) -> TranscriberConfig | None:
    if not task.speaks:
        return None
    name = args.transcriber or TranscriberConfig.name
    config: TranscriberConfig = transcriber_group().read(args, name=name)
    if isinstance(task, SeedTTS) and task.language == "zh":
        name = args.chinese_transcriber or "paraformer"
        config = replace(config, name=name, path=args.chinese_transcriber_path, language="zh")
    return _placed(config, args)


def _placed(config: TranscriberConfig, args: argparse.Namespace) -> TranscriberConfig:
    """The recogniser on its device."""
    return (
        config if config.name == "pocketsphinx" else replace(config, device=args.device or default_device())
    )


def _speaker(task: Task, args: argparse.Namespace) -> SpeakerConfig | None:
    if args.speaker_model in (None, "none") or not task.speaks:
        return None
    return SpeakerConfig(args.speaker_model, args.speaker_model_path, args.device or default_device())
