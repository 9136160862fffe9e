"""Tokens per second and time to the first audio chunk for every schedule.

``python tools/benchmark.py generate --model configs/models/qwen2.5_0.5b_mtp10.json``

Generating one row at a time reads every weight once per pass and does almost no arithmetic with it, so
memory bandwidth is the limit: a token from the backbone costs the bytes of the backbone, the final norm and
the LM head; one from a head costs the bytes of that head and again of the LM head. The limit column is the
bandwidth of one large sum on this machine divided by the bytes a schedule needs per token. The gap
to it is launch and Python overhead, attention over the cache and sampling.

The first chunk is ``<|begin_of_audio|>``, eight speech tokens and ``<|end_of_audio|>``: the time until its ten
tokens are generated, including prefill. Boost and Turbo have it after one backbone pass.

``--model`` is a config.json (random weights: speed does not depend on them) or a folder.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import islice
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

from vita_audio.cli.arguments import command_parser
from vita_audio.models.schedule import BACKBONE, SCHEDULES, Schedule

FIRST_CHUNK_TOKENS = 10


def main(argv: list[str]) -> None:
    arguments = parse(argv)
    model = build_model(arguments)
    bandwidth = read_bandwidth(arguments.device)
    table = Table(title=f"Generation of {arguments.tokens} tokens after a prompt of {arguments.prompt}")
    for column in ("schedule", "tokens/s", "limit, tokens/s", "of the limit", "x vanilla", "first chunk, ms"):
        table.add_column(column, justify="left" if column == "schedule" else "right")
    summary: dict[str, dict[str, float]] = {}
    for name, mode in SCHEDULES.items():
        times = measure(model, list(mode), arguments)
        speed = arguments.tokens / times[-1]
        limit = bandwidth * arguments.tokens / bytes_read(model, list(mode), arguments.tokens)
        summary[name] = {
            "tokens_per_second": round(speed, 2),
            "limit": round(limit, 2),
            "first_chunk_ms": round(1000 * times[FIRST_CHUNK_TOKENS - 1], 1),
        }
        gain = speed / summary["vanilla"]["tokens_per_second"]
        table.add_row(
            name.capitalize(),
            f"{speed:.1f}",
            f"{limit:.1f}",
            f"{speed / limit:.0%}",
            f"{gain:.2f}",
            f"{summary[name]['first_chunk_ms']:.1f}",
        )
    console = Console()
    console.print(table)
    console.print(f"Bandwidth of this machine, read by one large sum: {bandwidth / 1e9:.1f} GB/s")
    print(json.dumps(summary))


def parse(argv: list[str]) -> argparse.Namespace:
    parser = command_parser(__doc__, prog="benchmark.py generate")
    parser.add_argument("--model", type=Path, required=True, help="config.json or a model folder")
    parser.add_argument("--prompt", type=int, default=32, help="prompt tokens (the paper's figure: 32)")
    parser.add_argument("--tokens", type=int, default=128, help="tokens to generate")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs; the fastest counts")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def build_model(arguments: argparse.Namespace):
    if not arguments.model.exists():
        raise ValueError(f"{arguments.model}: no such file or folder; give a config.json or a model folder")
    options = {"dtype": getattr(torch, arguments.dtype), "attn_implementation": arguments.attention}
    if arguments.model.is_dir():
        model = AutoModelForCausalLM.from_pretrained(arguments.model, **options)
    else:
        with torch.device(arguments.device):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(arguments.model), **options)
    return model.to(arguments.device).eval()


class Stopwatch:
    """A streamer that records the time of each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def measure(model, mode: list[int], arguments: argparse.Namespace) -> list[float]:
    """Seconds from the call to each token, of the fastest run."""
    prompt = torch.randint(model.config.vocab_size, (1, arguments.prompt), device=arguments.device)
    runs = []
    for _ in range(arguments.repeats + 1):
        watch = Stopwatch()
        start = time.perf_counter()
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            mtp_inference_mode=mode,
            min_new_tokens=arguments.tokens,
            max_new_tokens=arguments.tokens,
            do_sample=False,
            pad_token_id=0,
            streamer=watch,
        )
        runs.append([moment - start for moment in watch.times[1:]])  # the first put is the prompt
    return min(runs[1:], key=lambda times: times[-1])


def bytes_read(model, mode: list[int], tokens: int) -> float:
    """Bytes of weights that a schedule must read for this many tokens."""

    def size(*modules) -> int:
        return sum(p.numel() * p.element_size() for module in modules for p in module.parameters())

    backbone_layers = model.model.layers[: model.config.num_backbone_layers]
    backbone = size(*backbone_layers, model.model.norm)
    heads = [
        size(head.embed_norm, head.hidden_norm, head.proj, head.layer, head.final_norm)
        for head in model.heads
    ]
    steps = islice(Schedule.parse(mode).steps(len(heads)), tokens)
    passes = sum(backbone if step == BACKBONE else heads[step] for step in steps)
    return passes + tokens * size(model.lm_head)


def read_bandwidth(device: str) -> float:
    """Bytes per second read by one large sum."""
    data = torch.ones(2**27, dtype=torch.float32, device=device)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        data.sum().item()
        best = min(best, time.perf_counter() - start)
    return data.numel() * data.element_size() / best
