"""The engine against the plain loop, in every mode, in one run.

``python tools/benchmark.py decode --model configs/models/qwen2.5_0.5b_mtp10.json``
``python tools/benchmark.py decode --sizes 0.5b 1.5b 3b 7b --tokens 4096``

One row of tokens costs the bytes of the weights that its passes read: decoding runs at the machine's bandwidth. The
limit is that bandwidth, measured in the same run by the engine's own matrix-vector product, divided by the bytes
per token. The ways take turns, and the fastest of their runs counts.

* plain: the loop of ``model.generate``;
* engine: the same tokens from the engine;
* engine_int8, with ``--quantization int8``: the engine with weights in 8 bits, with a limit of its own;
* engine_audio_rows: the heads read only the vocabulary's rows of speech (``audio_rows="on"``).

With random weights the heads' drafts are never accepted, so the lossless row then shows the cost, not the gain.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import torch
import transformers
from benchmarks.generate import Stopwatch, build_model
from rich.console import Console
from rich.table import Table

from vita_audio.cli.arguments import command_parser
from vita_audio.engine import AudioRows, Engine, Quantization, Request
from vita_audio.models.schedule import BACKBONE, SCHEDULES, Schedule

WAYS = ("plain", "engine", "engine_audio_rows", "engine_int8")
MODES = (*SCHEDULES, "lossless")
FIRST = 11
"""Tokens of Turbo's first round."""
SPEECH_ROWS = 16_400
"""Rows from the first marker of speech to the end of the released vocabularies."""


@dataclass
class Run:
    """One measurement; times in seconds."""

    seconds: float
    first: float
    backbone_passes: int
    head_passes: int


def main(argv: list[str]) -> None:
    arguments = parse(argv)
    console = Console(width=130)
    results: dict[str, dict[str, Any]] = {}
    for path in models(arguments):
        results[path.stem] = measure_model(path, arguments, console)
    if arguments.png is not None:
        draw(results, arguments)
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": device_name(arguments),
    }
    last = results if arguments.sizes else next(iter(results.values()))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"versions": versions, "results": results}, indent=1) + "\n")
    console.print(", ".join(f"{name} {value}" for name, value in versions.items()))
    print(json.dumps(last))


def parse(argv: list[str]) -> argparse.Namespace:
    parser = command_parser(__doc__, prog="benchmark.py decode")
    parser.add_argument("--model", type=Path, help="config.json or a model folder")
    parser.add_argument("--sizes", nargs="+", help="sizes of configs/models instead: 0.5b 1.5b 3b 7b")
    parser.add_argument("--prompt", type=int, default=32, help="prompt tokens (the paper's figure: 32)")
    parser.add_argument(
        "--tokens", type=int, default=66, help="tokens to generate (the paper's figure: 4096)"
    )
    parser.add_argument("--repeats", type=int, default=3, help="timed runs; the fastest counts")
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[1], help="replies at once, in the engine's Boost"
    )
    parser.add_argument("--modes", nargs="+", default=MODES, choices=MODES)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument(
        "--quantization", choices=get_args(Quantization), default="none", help="measure it too"
    )
    parser.add_argument("--attention", default="sdpa", help="of the plain loop")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--png", type=Path, help="draw the speeds into this file")
    parser.add_argument("--json", type=Path, help="write all figures into this file")
    arguments = parser.parse_args(argv)
    if (arguments.model is None) == (arguments.sizes is None):
        parser.error("give --model or --sizes")
    return arguments


def models(arguments: argparse.Namespace) -> list[Path]:
    if arguments.model is not None:
        return [arguments.model]
    folder = Path(__file__).parents[2] / "configs" / "models"
    return [folder / f"qwen2.5_{size.lower()}_mtp10.json" for size in arguments.sizes]


def device_name(arguments: argparse.Namespace) -> str:
    if arguments.device.startswith("cuda"):
        return torch.cuda.get_device_name()
    return f"cpu, {torch.get_num_threads()} threads"


def measure_model(path: Path, arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """All ways and modes of one model, printed as a table."""
    arguments.model = path
    model = build_model(arguments)
    speech = model.config.vocab_size - min(SPEECH_ROWS, model.config.vocab_size // 2)
    length = arguments.prompt + arguments.tokens
    rows = AudioRows(speech, speech + 1)
    engine = Engine(model, max_rows=max(arguments.rows), max_length=length, speech=rows)
    engines = dict.fromkeys(WAYS[1:], engine)
    if arguments.quantization != "none":
        engines["engine_int8"] = Engine(
            model, max_rows=1, max_length=length, speech=rows, quantization=arguments.quantization
        )
    bandwidths = {way: read_speed(each) for way, each in engines.items()}
    bandwidths["plain"] = bandwidth = bandwidths["engine"]
    runs: dict[tuple[str, str], list[Run]] = {}
    for _ in range(arguments.repeats + 1):  # the first run of each warms up
        for way, mode in ways(arguments):
            run = (
                plain(model, mode, arguments)
                if way == "plain"
                else engine_run(engines[way], way, mode, arguments)
            )
            runs.setdefault((way, mode), []).append(run)
    table = Table(
        title=f"{path.stem}: {arguments.tokens} tokens after a prompt of {arguments.prompt}, {arguments.dtype}"
    )
    columns = (
        "mode",
        "way",
        "tokens/s",
        "x plain",
        "first 11, ms",
        "passes/token",
        "MB/token",
        "of the limit",
    )
    for column in columns:
        table.add_column(column, justify="left" if column in ("mode", "way") else "right")
    summary: dict[str, Any] = {way: {} for way in WAYS}
    for way, mode in ways(arguments):
        best = min(runs[way, mode][1:], key=lambda run: run.seconds)
        first = min(run.first for run in runs[way, mode][1:])
        speed = arguments.tokens / best.seconds
        size = bytes_read(engines.get(way, engine), best, way) / arguments.tokens
        reference = summary["plain"].get("vanilla" if mode == "lossless" else mode)
        summary[way][mode] = {
            "tokens_per_second": round(speed, 2),
            "first_11_seconds": round(first, 4),
            "share_of_limit": round(speed * size / bandwidths[way], 3),
        }
        gain = "" if reference is None else f"{speed / reference['tokens_per_second']:.2f}"
        table.add_row(
            mode, way, f"{speed:.1f}", gain, f"{1000 * first:.1f}", f"{best.backbone_passes / arguments.tokens:.2f}",
            f"{size / 1e6:.0f}", f"{speed * size / bandwidths[way]:.0%}",
        )  # fmt: skip
    console.print(table)
    console.print(f"Weights are read at {bandwidth / 1e9:.1f} GB/s by one row")
    summary["rows"] = {}
    for count in arguments.rows:
        seconds = min(together(engine, count, arguments) for _ in range(2))
        summary["rows"][str(count)] = round(count * arguments.tokens / seconds, 2)
        console.print(f"Boost, {count} replies at once: {summary['rows'][str(count)]:.1f} tokens/s in all")
    del model, engine, engines
    gc.collect()
    return summary


def ways(arguments: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """The measurements in the order of the table."""
    for mode in arguments.modes:
        for way in WAYS if arguments.quantization != "none" else WAYS[:-1]:
            if (way, mode) != ("plain", "lossless"):
                yield way, mode


def plain(model: Any, mode: str, arguments: argparse.Namespace) -> Run:
    prompt = torch.arange(arguments.prompt, device=arguments.device)[None] + 5
    watch = Stopwatch()
    begin = now(arguments)
    with torch.inference_mode():
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            mtp_inference_mode=mode,
            max_new_tokens=arguments.tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            streamer=watch,
        )
    seconds = now(arguments) - begin
    steps = list(islice(Schedule.parse(mode).steps(model.config.num_nextn_predict_layers), arguments.tokens))
    passes = steps.count(BACKBONE)
    return Run(seconds, watch.times[FIRST] - begin, passes, len(steps) - passes)


def engine_run(engine: Engine, way: str, mode: str, arguments: argparse.Namespace) -> Run:
    lossless = mode == "lossless"
    request = Request(
        list(range(5, 5 + arguments.prompt)),
        "vanilla" if lossless else mode,
        lossless=lossless,
        audio_rows="on" if way == "engine_audio_rows" else "off",
        max_new_tokens=arguments.tokens,
    )
    begin = now(arguments)
    handle = engine.submit(request)
    first, count = 0.0, 0
    for event in handle:
        count += len(getattr(event, "ids", ()))
        if not first and count >= FIRST:
            first = time.perf_counter() - begin
    seconds = now(arguments) - begin
    if lossless:
        return Run(seconds, first, handle.stats.rounds, handle.stats.drafts)
    steps = list(islice(Schedule.parse(mode).steps(engine.num_heads), arguments.tokens))
    passes = steps.count(BACKBONE)
    return Run(seconds, first, passes, len(steps) - passes)


def together(engine: Engine, count: int, arguments: argparse.Namespace) -> float:
    """Seconds for several replies at once."""
    begin = now(arguments)
    requests = [
        Request([5 + row, *range(5, 4 + arguments.prompt)], "boost", max_new_tokens=arguments.tokens)
        for row in range(count)
    ]
    handles = [engine.submit(request) for request in requests]
    for handle in handles:
        handle.tokens()
    return now(arguments) - begin


def bytes_read(engine: Engine, run: Run, way: str) -> int:
    """Bytes of weights that a run's passes read."""
    weights = engine.weights
    projection = weights.audio_head if way == "engine_audio_rows" else weights.lm_head
    assert projection is not None
    head = weights.heads[0].proj.num_bytes + weights.heads[0].layer.num_bytes if weights.heads else 0
    return run.backbone_passes * weights.backbone_bytes + run.head_passes * (head + projection.num_bytes)


@torch.inference_mode()
def read_speed(engine: Engine) -> float:
    """Bytes per second of the engine's product with one row, over a matrix that no cache holds."""
    product = engine.weights.lm_head
    x = torch.randn(1, product.in_features, dtype=engine.weights.dtype, device=engine.weights.device)
    best = float("inf")
    for _ in range(10):
        begin = time.perf_counter()
        for _ in range(5):
            y = product(x)
        y[0, 0].item()
        best = min(best, (time.perf_counter() - begin) / 5)
    return product.num_bytes / best


def now(arguments: argparse.Namespace) -> float:
    if arguments.device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def draw(results: dict[str, dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Tokens per second by mode and way, one panel for each model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(results), figsize=(5 * len(results) + 1, 4), squeeze=False)
    for panel, (name, summary) in zip(panels[0], results.items(), strict=True):
        for offset, way in enumerate(WAYS):
            speeds = [summary[way].get(mode, {}).get("tokens_per_second", 0.0) for mode in arguments.modes]
            places = [place + 0.27 * (offset - 1) for place in range(len(speeds))]
            bars = panel.bar(places, speeds, width=0.25, label=way.replace("_", " "))
            panel.bar_label(bars, fmt=lambda speed: f"{speed:.0f}" if speed else "", fontsize=7)
        panel.set_xticks(range(len(arguments.modes)), arguments.modes)
        panel.set_title(f"{name}, {arguments.dtype}, {device_name(arguments)}", fontsize=9)
        panel.set_ylabel("tokens/s")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(arguments.png, dpi=150)
