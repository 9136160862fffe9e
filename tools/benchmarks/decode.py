"""The engine against the plain loop, in every mode, in one run.

``python tools/benchmark.py decode --model configs/models/qwen2.5_0.5b_mtp10.json``
``python tools/benchmark.py decode --sizes 0.5b 1.5b 3b 7b --tokens 4096``

One row of tokens costs the bytes of the weights that its passes read: decoding runs at the machine's bandwidth. The
limit is that bandwidth, measured by the engine's own matrix-vector products before and after each run, divided by the
bytes per token. The ways take turns, and the fastest of their runs counts; of the shares of the limit, the median.

* plain: the loop of ``model.generate``;
* engine: the same tokens from the engine;
* engine_audio_rows: the heads read only the vocabulary's rows of speech (``audio_rows="on"``);
* engine_int8, if ``--ways`` names it: weights in 8 bits. It has a limit of its own.

With random weights the heads' drafts are never accepted, so the lossless row then shows the cost, not the gain.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers
from benchmarks.generate import Stopwatch, build_model
from rich.console import Console
from rich.table import Table

from vita_audio.cli.arguments import command_parser
from vita_audio.engine import AudioRows, Engine, Request
from vita_audio.models.schedule import BACKBONE, SCHEDULES, Schedule

WAYS = ("plain", "engine", "engine_audio_rows", "engine_int8")
MODES = (*SCHEDULES, "lossless")
CHUNKS = Schedule.parse("1 10 4 10")
"""Text and speech alternate as in training: a chunk of ten speech tokens after 1 token of text, then after 4 each."""
FIRST = sum(CHUNKS.pairs[0])
"""Tokens up to the end of the first chunk, and of Turbo's first round."""
READS = 6
"""Times that the matrices are read to measure the bandwidth. The mean counts, as of a run: what else the machine does
slows both."""
SPEECH_ROWS = 16_400
"""Rows from the first marker of speech to the end of the released vocabularies."""


@dataclass
class Run:
    """One measurement; times in seconds.

    Attributes:
        seconds: of the whole reply, with the prompt.
        chunks: until each chunk of speech is generated.
        speech_passes: backbone passes that read the vocabulary's rows of speech alone.
        bandwidth: bytes per second of the engine's product, around the run.
        share: of that bandwidth, what the run read.
    """

    seconds: float
    chunks: list[float]
    backbone_passes: int
    head_passes: int
    speech_passes: int = 0
    bandwidth: float = 0.0
    share: float = 0.0

    @property
    def first(self) -> float:
        return self.chunks[0]


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
    add_arguments(parser)
    parser.add_argument("--png", type=Path, help="draw the speeds into this file")
    parser.add_argument("--json", type=Path, help="write all figures into this file")
    return check(parser, parser.parse_args(argv))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is measured; :func:`check` checks it."""
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
    parser.add_argument("--ways", nargs="+", default=WAYS[:3], choices=WAYS)
    parser.add_argument(
        "--warm_up", type=int, metavar="N", help="tokens of the first run, which is not timed (default: all)"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--attention", default="sdpa", help="of the plain loop")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> argparse.Namespace:
    """The arguments, unless they cannot be measured."""
    if arguments.tokens < FIRST:
        parser.error(f"--tokens {arguments.tokens}: give {FIRST} or more, the first chunk")
    if arguments.repeats < 1:
        parser.error(f"--repeats {arguments.repeats}: give 1 or more")
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
    model, engines = build(path, arguments)
    engine = engines["engine"]
    runs = best_runs(model, engines, arguments, limits=True)
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
        best = runs[way, mode]
        speed = arguments.tokens / best.seconds
        size = bytes_read(engines.get(way, engine), best, way) / arguments.tokens
        reference = summary["plain"].get("vanilla" if mode == "lossless" else mode)
        summary[way][mode] = {
            "tokens_per_second": round(speed, 2),
            "first_11_seconds": round(best.first, 4),
            "share_of_limit": round(best.share, 3),
        }
        gain = "" if reference is None else f"{speed / reference['tokens_per_second']:.2f}"
        table.add_row(
            mode, way, f"{speed:.1f}", gain, f"{1000 * best.first:.1f}",
            f"{best.backbone_passes / arguments.tokens:.2f}", f"{size / 1e6:.0f}", f"{best.share:.0%}",
        )  # fmt: skip
    console.print(table)
    speeds = [run.bandwidth / 1e9 for (way, _), run in runs.items() if way != "engine_int8"]
    theirs = read_speed_of_pytorch(model) / 1e9
    console.print(
        f"One row reads weights at {min(speeds):.1f} to {max(speeds):.1f} GB/s, with PyTorch's product at {theirs:.1f}"
    )
    summary["rows"] = {}
    for count in arguments.rows:
        seconds = min(together(engine, count, arguments) for _ in range(2))
        summary["rows"][str(count)] = round(count * arguments.tokens / seconds, 2)
        console.print(f"Boost, {count} replies at once: {summary['rows'][str(count)]:.1f} tokens/s in all")
    del model, engine, engines
    gc.collect()
    return summary


def build(path: Path, arguments: argparse.Namespace) -> tuple[Any, dict[str, Engine]]:
    """A model, and the engine of each way."""
    model = build_model(argparse.Namespace(**{**vars(arguments), "model": path}))
    speech = model.config.vocab_size - min(SPEECH_ROWS, model.config.vocab_size // 2)
    length = arguments.prompt + arguments.tokens
    rows = AudioRows(speech, speech + 1)
    engines = dict.fromkeys(WAYS[1:3], Engine(model, max(arguments.rows), length, rows))
    if "engine_int8" in arguments.ways:
        engines["engine_int8"] = Engine(model, 1, length, rows, quantization="int8")
    return model, engines


def best_runs(
    model: Any, engines: dict[str, Engine], arguments: argparse.Namespace, limits: bool = False
) -> dict[tuple[str, str], Run]:
    """The fastest run of each way and mode; they take turns. The first chunk's time is the fastest of all runs.

    Args:
        limits: also measure the bandwidth around each run.
    """
    runs: dict[tuple[str, str], list[Run]] = {}
    for repeat in range(arguments.repeats + 1):  # the first run of each warms up
        tokens = arguments.tokens if repeat or arguments.warm_up is None else arguments.warm_up
        for way, mode in ways(arguments):
            engine = engines.get(way, engines["engine"])
            before = read_speed(engine) if limits else 0.0
            if way == "plain":
                run = plain(model, mode, arguments, tokens)
            else:
                run = engine_run(engine, way, mode, arguments, tokens)
            if limits:
                run.bandwidth = (before + read_speed(engine)) / 2
                run.share = bytes_read(engine, run, way) / run.seconds / run.bandwidth
            runs.setdefault((way, mode), []).append(run)
    best = {}
    for key, (_, *timed) in runs.items():
        fastest = min(timed, key=lambda run: run.seconds)
        first = min(run.first for run in timed)
        share = statistics.median(run.share for run in timed)
        best[key] = replace(fastest, chunks=[first, *fastest.chunks[1:]], share=share)
    return best


def chunk_ends(tokens: int) -> list[int]:
    """Tokens up to the end of each chunk of speech in a reply of ``tokens``."""
    ends: list[int] = []
    for text, speech in CHUNKS.rounds():
        end = (ends[-1] if ends else 0) + text + speech
        if end > tokens:
            return ends
        ends.append(end)
    raise AssertionError("a schedule has no end")


def ways(arguments: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """The measurements in the order of the table."""
    for mode in arguments.modes:
        for way in arguments.ways:
            if (way, mode) != ("plain", "lossless"):
                yield way, mode


def plain(model: Any, mode: str, arguments: argparse.Namespace, tokens: int) -> Run:
    prompt = torch.arange(arguments.prompt, device=arguments.device)[None] + 5
    watch = Stopwatch()
    begin = now(arguments)
    with torch.inference_mode():
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            mtp_inference_mode=mode,
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            streamer=watch,
        )
    seconds = now(arguments) - begin
    steps = list(islice(Schedule.parse(mode).steps(model.config.num_nextn_predict_layers), tokens))
    passes = steps.count(BACKBONE)
    chunks = [watch.times[end] - begin for end in chunk_ends(tokens)]  # times[0] is the prompt's
    return Run(seconds, chunks, passes, len(steps) - passes)


def engine_run(engine: Engine, way: str, mode: str, arguments: argparse.Namespace, tokens: int) -> Run:
    lossless = mode == "lossless"
    request = Request(
        list(range(5, 5 + arguments.prompt)),
        "vanilla" if lossless else mode,
        lossless=lossless,
        audio_rows="on" if way == "engine_audio_rows" else "off",
        max_new_tokens=tokens,
    )
    begin = now(arguments)
    handle = engine.submit(request)
    chunks: list[float] = []
    ends, ids = chunk_ends(tokens), request.prompt[-1:]
    for event in handle:
        ids += getattr(event, "ids", ())
        ready = sum(end < len(ids) for end in ends)
        chunks += [time.perf_counter() - begin] * (ready - len(chunks))
    seconds = now(arguments) - begin
    if lossless:
        return Run(seconds, chunks, handle.stats.rounds, handle.stats.drafts)
    steps = list(islice(Schedule.parse(mode).steps(engine.num_heads), tokens))
    passes = steps.count(BACKBONE)
    rows = engine.weights.audio_rows
    speech = 0
    if way == "engine_audio_rows" and rows is not None:
        inside = [rows.begin <= last != rows.end for last in ids[:-1]]
        speech = sum(step == BACKBONE and restricted for step, restricted in zip(steps, inside, strict=True))
    return Run(seconds, chunks, passes, len(steps) - passes, speech)


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
    full = weights.lm_head.num_bytes
    speech = 0 if weights.audio_head is None else weights.audio_head.num_bytes
    head = weights.heads[0].proj.num_bytes + weights.heads[0].layer.num_bytes if weights.heads else 0
    projection = speech if way == "engine_audio_rows" else full
    total = run.backbone_passes * weights.backbone_bytes + run.head_passes * (head + projection)
    return total - run.speech_passes * (full - speech)


@torch.inference_mode()
def read_speed(engine: Engine) -> float:
    """Bytes per second of the engine's products with one row: the largest of each layer and the LM head, in turn, so
    that no cache holds a part of them."""
    weights = engine.weights
    products = [*(layer.gate_up for layer in weights.layers), weights.lm_head]
    x = torch.randn(1, weights.d, dtype=weights.dtype, device=weights.device)
    for product in products:
        y = product(x)
    y[0, 0].item()
    begin = time.perf_counter()
    for _ in range(READS):
        for product in products:
            y = product(x)
    y[0, 0].item()
    return READS * sum(product.num_bytes for product in products) / (time.perf_counter() - begin)


@torch.inference_mode()
def read_speed_of_pytorch(model: Any) -> float:
    """The same of PyTorch's product with the LM head."""
    weight = model.lm_head.weight.detach()
    x = torch.randn(1, weight.shape[1], dtype=weight.dtype, device=weight.device)
    torch.mm(x, weight.t())[0, 0].item()
    begin = time.perf_counter()
    for _ in range(READS):
        y = torch.mm(x, weight.t())
    y[0, 0].item()
    return READS * weight.numel() * weight.element_size() / (time.perf_counter() - begin)


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
        for number, way in enumerate(arguments.ways):
            speeds = [summary[way].get(mode, {}).get("tokens_per_second", 0.0) for mode in arguments.modes]
            width = 0.8 / len(arguments.ways)
            places = [place - 0.4 + width * (number + 0.5) for place in range(len(speeds))]
            bars = panel.bar(places, speeds, width=0.95 * width, label=way.replace("_", " "))
            panel.bar_label(bars, fmt=lambda speed: f"{speed:.0f}" if speed else "", fontsize=7)
        panel.set_xticks(range(len(arguments.modes)), arguments.modes)
        panel.set_title(f"{name}, {arguments.dtype}, {device_name(arguments)}", fontsize=9)
        panel.set_ylabel("tokens/s")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(arguments.png, dpi=150)
