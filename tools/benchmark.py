"""The benchmarks: ``python tools/benchmark.py NAME [OPTIONS]``.

Each is a module of ``tools/benchmarks`` with a ``main(argv)``. Each measures two ways of doing the same
work in one run and prints the ratio. The original's ``benchmark_llm`` is ``generate`` and its
``benchmark_sts`` is ``sts``; those names also work.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from vita_audio.cli.arguments import command_parser, run_command

BENCHMARKS = {
    "train-step": "train_step",
    "generate": "generate",
    "decode": "decode",
    "paper-speed": "speed",
    "packing": "packing",
    "loader": "loader",
    "mix": "mix",
    "prepare": "prepare",
    "codec": "codec",
    "codec-streams": "codec_streams",
    "memory": "memory",
    "long-stream": "long_stream",
    "lossless": "lossless",
    "sts": "sts",
    "serve": "serve",
    "gpu": "gpu",
    "soak": "soak",
    "barge-in": "barge_in",
    "scale": "scale",
    "benchmark_llm": "generate",
    "benchmark_sts": "sts",
}


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = command_parser(__doc__, add_help=len(argv) < 2)
    parser.add_argument("name", choices=BENCHMARKS)
    arguments, rest = parser.parse_known_args(argv)
    sys.path.insert(0, str(Path(__file__).parent))
    import_module(f"benchmarks.{BENCHMARKS[arguments.name]}").main(rest)


if __name__ == "__main__":
    run_command(main)
