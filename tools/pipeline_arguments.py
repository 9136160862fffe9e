"""What the commands that run a model have in common: their arguments, and how they end."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from vita_audio import distributed
from vita_audio.audio import available_kinds
from vita_audio.chat.prompts import SYSTEM_PROMPTS
from vita_audio.evaluation.transcribers import TranscriberConfig, TranscriberPool
from vita_audio.files import write_json
from vita_audio.inference import GenerationOptions, SpeechPipeline


def add_codec_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("codec")
    group.add_argument(
        "--audio_tokenizer_type", default="glm4voice", choices=available_kinds(), metavar="KIND",
        help=f"one of {', '.join(available_kinds())} (default: glm4voice)",
    )  # fmt: skip
    group.add_argument("--audio_tokenizer_path", metavar="DIR", help="weights of the speech tokenizer")
    group.add_argument("--flow_path", metavar="DIR", help="weights of the decoder, where they lie apart")
    group.add_argument(
        "--frontend_path", "--audio_model_name_or_path", metavar="DIR", dest="frontend_path",
        help="SenseVoice folder with am.mvn, for sensevoice_* kinds",
    )  # fmt: skip


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--model_name_or_path", required=True, metavar="DIR", help="checkpoint folder")
    add_runtime_arguments(parser)


def add_runtime_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("runtime")
    group.add_argument("--device", help="default: cuda where there is one")
    group.add_argument(
        "--dtype", default="auto", help="auto, float32, bfloat16 (default: auto, the checkpoint's)"
    )
    group.add_argument(
        "--attn_implementation", metavar="NAME", help="sdpa, eager, flash_attention_2, flex_attention"
    )


def add_generation_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("generation")
    group.add_argument(
        "--mode", "--mtp_inference_mode", nargs="+", default=["boost"], metavar="MODE",
        help="vanilla, balance, boost, turbo, or numbers such as 1 10 4 10 (default: boost)",
    )  # fmt: skip
    group.add_argument("--max_new_tokens", type=int, default=1024)
    group.add_argument("--do_sample", action="store_true", help="draw tokens instead of taking the likeliest")
    group.add_argument("--temperature", type=float, default=1.0)
    group.add_argument("--top_k", type=int, default=0)
    group.add_argument("--top_p", type=float, default=1.0)
    group.add_argument("--repetition_penalty", type=float, default=1.0)
    group.add_argument("--seed", type=int, default=42, help="of sampling (default: 42)")


def add_system_prompt_argument(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--system_prompt", default=default, metavar="NAME|TEXT",
        help=f"system message of conversations that have none: {', '.join(SYSTEM_PROMPTS)}, "
        f"or the message itself (default: {default})",
    )  # fmt: skip


def add_transcriber_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("recogniser")
    group.add_argument(
        "--transcriber", default="pocketsphinx", choices=("pocketsphinx", "whisper", "paraformer"),
        help="what listens to the model's speech (default: pocketsphinx)",
    )  # fmt: skip
    group.add_argument("--transcriber_path", metavar="DIR", help="weights of whisper or paraformer")
    group.add_argument("--grammar", metavar="FILE", help="JSGF grammar for pocketsphinx")
    group.add_argument("--language", help="spoken language for whisper, such as en")
    group.add_argument(
        "--transcriber_processes", type=int, default=2, metavar="N",
        help="recognisers side by side; 0 recognises in this process (default: 2)",
    )  # fmt: skip


def transcriber_pool(args: argparse.Namespace) -> TranscriberPool:
    config = TranscriberConfig(
        name=args.transcriber,
        path=args.transcriber_path,
        grammar=args.grammar,
        language=args.language,
        device="cpu" if args.transcriber == "pocketsphinx" else args.device or default_device(),
    )
    return TranscriberPool(config, args.transcriber_processes)


def add_test_set_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("test set")
    group.add_argument("--data_root", type=Path, metavar="DIR", help="where relative audio paths start")
    group.add_argument("--limit", type=int, metavar="N", help="at most N items, spread over the file")
    group.add_argument("--batch_size", type=int, default=32, help="replies generated together (default: 32)")
    group.add_argument("--output_dir", type=Path, required=True, metavar="DIR")


def report(task: str, scores: dict[str, object], output_dir: Path) -> None:
    """Write ``TASK_scores.json`` and show it; only the first process does."""
    if distributed.is_first():
        write_json(output_dir / f"{task}_scores.json", scores)
        table = Table(title=f"{task} · {output_dir}")
        table.add_column("score")
        table.add_column("value", justify="right")
        for name, value in scores.items():
            table.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value))
        Console().print(table)


def system_prompt(args: argparse.Namespace) -> str | None:
    return SYSTEM_PROMPTS.get(args.system_prompt, args.system_prompt)


def generation_options(args: argparse.Namespace) -> GenerationOptions:
    return GenerationOptions(
        mode=" ".join(args.mode),
        max_new_tokens=args.max_new_tokens,
        do_sample=args.do_sample,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed if args.do_sample else None,
    )


def open_pipeline(args: argparse.Namespace, model_dir: str | Path | None = None) -> SpeechPipeline:
    return SpeechPipeline.from_pretrained(
        model_dir or args.model_name_or_path,
        args.audio_tokenizer_type,
        args.audio_tokenizer_path,
        flow_path=args.flow_path,
        frontend_path=args.frontend_path,
        device=args.device or default_device(),
        dtype=args.dtype,
        attn_implementation=args.attn_implementation,
    )


def default_device() -> str:
    """This process's GPU, or the CPU."""
    return f"cuda:{distributed.local_rank()}" if torch.cuda.is_available() else "cpu"


def run(main: Callable[[], None]) -> None:
    """Run a command; bad input ends it with one line, not with a traceback."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        main()
    except (ValueError, OSError) as error:
        if os.environ.get("VITA_AUDIO_TRACEBACK"):
            raise
        sys.exit(f"error: {next(iter(str(error).strip().splitlines()), type(error).__name__)}")
    except KeyboardInterrupt:
        sys.exit(130)
