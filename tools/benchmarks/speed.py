"""The paper's speed tables and figures: total time by size and mode, first chunk, cost of a head, chunks in streaming.

``python tools/benchmark.py paper-speed --sizes 0.5b 1.5b 3b 7b --output_dir output/speed``
``python tools/benchmark.py paper-speed --model DIR --question q.wav --audio_tokenizer_path DIR --output_dir output``

As the paper measures: 4096 tokens after a prompt of 32 (``--tokens``, ``--prompt``), for ``--sizes`` with random
weights, on which speed does not depend. Speed-up is against Vanilla made in the same way. A chunk is ten speech tokens,
after 1, then 4 tokens of text. The time of a pass of the backbone and of a head follows from the totals of Vanilla and
Turbo. With ``--question`` a checkpoint also answers aloud in every mode, and the seconds to each chunk of sound are
measured through the codec.

Measured by ``decode`` and ``sts``. Writes speed.json, speed.md, and the figures speed and chunks as PNG and SVG.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from benchmarks import decode, sts
from matplotlib.figure import Figure

from vita_audio.cli.arguments import CODEC, command_parser
from vita_audio.evaluation.figures import bar_groups, lines, save_figure
from vita_audio.files import write_json, write_text
from vita_audio.inference import GenerationOptions, RuntimeOptions, SpeechPipeline, prompts
from vita_audio.models.schedule import SCHEDULES, schedules_for

SHOWN_CHUNKS = 20
PUBLISHED = (
    "Published for 7B (arXiv 2505.03739, Figure 2, and the public repository's README): first chunk after 236 ms in "
    "Vanilla and 53 ms with heads, with 32 tokens of prompt; a pass of a head takes 2.4 ms, 11% of the backbone's; "
    "3 to 5 times the speed of Vanilla."
)
Result = dict[str, Any]


def main(argv: list[str]) -> None:
    parser = command_parser(__doc__, prog="benchmark.py paper-speed")
    decode.add_arguments(parser)
    parser.add_argument("--output_dir", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--question", metavar="WAV", help="a spoken question, to time an answer with its sound"
    )
    CODEC.add_to(parser)
    parser.set_defaults(tokens=4096, repeats=1)
    arguments = decode.check(parser, parser.parse_args(argv))
    if arguments.question and not arguments.model:
        parser.error("--question needs --model, a checkpoint that answers")
    results: Result = {
        "tokens": arguments.tokens,
        "prompt": arguments.prompt,
        "dtype": arguments.dtype,
        "device": decode.device_name(arguments),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "models": {
            path.name if path.is_dir() else path.stem: measure(path, arguments)
            for path in decode.models(arguments)
        },
        "streaming": streaming(arguments) if arguments.question else {},
    }
    text = markdown(results)
    write_json(arguments.output_dir / "speed.json", results)
    write_text(arguments.output_dir / "speed.md", text)
    save_figure(speed_figure(results), arguments.output_dir / "speed")
    save_figure(chunk_figure(results), arguments.output_dir / "chunks")
    print(f"{text}\n{arguments.output_dir / 'speed.md'}")


def measure(path: Path, arguments: argparse.Namespace) -> Result:
    """Every way of a model: ``modes`` with their times, and ``passes``; see :func:`passes`."""
    model, engines = decode.build(path, arguments)
    runs = decode.best_runs(model, engines, arguments)
    del model, engines
    gc.collect()
    found: Result = {}
    for way in arguments.ways:
        modes = {mode: run for (made, mode), run in runs.items() if made == way}
        found[way] = {
            "modes": {
                mode: {
                    "seconds": run.seconds,
                    "tokens_per_second": arguments.tokens / run.seconds,
                    "speed_up": modes["vanilla"].seconds / run.seconds if "vanilla" in modes else None,
                    "first_chunk_seconds": run.first,
                    "chunk_seconds": run.chunks[: 2 * SHOWN_CHUNKS],
                }
                for mode, run in modes.items()
            },
            "passes": passes(modes),
        }
    return found


def passes(modes: Mapping[str, decode.Run]) -> Result | None:
    """Mean seconds of a pass of the backbone and of a head, and the head's share; None without Vanilla and Turbo."""
    if not {"vanilla", "turbo"} <= modes.keys():
        return None
    vanilla, turbo = modes["vanilla"], modes["turbo"]
    backbone = vanilla.seconds / vanilla.backbone_passes
    if not turbo.head_passes:
        return None
    head = (turbo.seconds - turbo.backbone_passes * backbone) / turbo.head_passes
    return {"backbone_seconds": backbone, "head_seconds": head, "head_share": head / backbone}


def streaming(arguments: argparse.Namespace) -> Result:
    """For each mode the seconds from a spoken question to each chunk of sound."""
    runtime = RuntimeOptions(arguments.device, arguments.dtype)
    pipeline = SpeechPipeline.open(arguments.model, CODEC.read(arguments), runtime)
    question = prompts.speech_to_speech(arguments.question, system=pipeline.system_message())
    found = {}
    for mode in schedules_for(pipeline.model.config.num_nextn_predict_layers, list(SCHEDULES)):
        _, streamed, chunks = sts.stream(pipeline, question, GenerationOptions.greedy(mode))
        found[mode] = {
            "chunk_seconds": [chunk.seconds for chunk in chunks],
            "first_sound_seconds": streamed.timings.first_sound,
            "total_seconds": streamed.timings.total,
        }
    return found


def markdown(results: Result) -> str:
    """The tables."""
    title = f"{results['tokens']} tokens after {results['prompt']}, {results['dtype']}, {results['device']}"
    parts = [
        f"### Speed: {title}",
        "",
        "| model | way | mode | seconds | tokens/s | × Vanilla | first chunk ms |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for name, way, mode, one in each_mode(results):
        gain = "–" if one["speed_up"] is None else f"{one['speed_up']:.2f}"
        parts.append(
            f"| {name} | {way} | {mode} | {one['seconds']:.2f} | {one['tokens_per_second']:.1f} | {gain} | "
            f"{1000 * one['first_chunk_seconds']:.1f} |"
        )
    parts += [
        "",
        "### A pass",
        "",
        "| model | way | backbone ms | head ms | head's share |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for name, ways in results["models"].items():
        for way, one in ways.items():
            if one["passes"]:
                times = one["passes"]
                parts.append(
                    f"| {name} | {way} | {1000 * times['backbone_seconds']:.2f} | {1000 * times['head_seconds']:.2f} | "
                    f"{times['head_share']:.0%} |"
                )
    chunks = {f"{name}, {way}, {mode}": one["chunk_seconds"] for name, way, mode, one in each_mode(results)}
    chunks |= {f"with sound, {mode}": one["chunk_seconds"] for mode, one in results["streaming"].items()}
    parts += ["", "### Seconds to each chunk of speech", ""]
    shown = range(min(10, max(map(len, chunks.values()))))
    parts.append(f"| | {' | '.join(str(number + 1) for number in shown)} |")
    parts.append(f"| --- |{' ---: |' * len(shown)}")
    for name, seconds in chunks.items():
        cells = (f"{seconds[number]:.3f}" if number < len(seconds) else "–" for number in shown)
        parts.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*parts, "", PUBLISHED, ""])


def each_mode(results: Result) -> Iterator[tuple[str, str, str, Result]]:
    """Model, way, mode and its figures, in the order of the table."""
    for name, ways in results["models"].items():
        for way, one in ways.items():
            for mode, figures in one["modes"].items():
                yield name, way.replace("_", " "), mode, figures


def speed_figure(results: Result) -> Figure:
    """Total seconds by model and mode, a panel for each way; bars are labelled with the speed-up."""
    panels: Result = {}
    for name, way, mode, one in each_mode(results):
        label = f"{one['seconds']:.1f} s" + ("" if one["speed_up"] is None else f"\n×{one['speed_up']:.1f}")
        title = f"{way}: {results['tokens']} tokens, {results['device']}"
        panels.setdefault(title, {}).setdefault(mode, {})[name] = (one["seconds"], label)
    return bar_groups(panels, "seconds")


def chunk_figure(results: Result) -> Figure:
    """Seconds to each chunk of speech by mode, a panel for each model in its last way, and one with sound."""
    panels: Result = {}
    for name, ways in results["models"].items():
        way, one = list(ways.items())[-1]
        panels[f"{name}, {way.replace('_', ' ')}"] = {
            mode: figures["chunk_seconds"][:SHOWN_CHUNKS] for mode, figures in one["modes"].items()
        }
    if results["streaming"]:
        panels["with sound"] = {
            mode: one["chunk_seconds"][:SHOWN_CHUNKS] for mode, one in results["streaming"].items()
        }
    return lines(panels, "chunk of speech", "seconds")
