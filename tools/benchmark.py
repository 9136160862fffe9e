"""One door to the benchmarks: ``python tools/benchmark.py NAME [OPTIONS]``.

Each benchmark is a module of ``tools/benchmarks`` with a ``main(argv)``. All of them measure
two ways of doing the same work side by side, in one run, and print the ratio.
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from pathlib import Path

BENCHMARKS = {
    "train-step": "train_step",
    "generate": "generate",
    "packing": "packing",
    "loader": "loader",
    "codec": "codec",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], add_help=len(sys.argv) < 3)
    parser.add_argument("name", choices=BENCHMARKS)
    arguments, rest = parser.parse_known_args()
    sys.path.insert(0, str(Path(__file__).parent))
    import_module(f"benchmarks.{BENCHMARKS[arguments.name]}").main(rest)


if __name__ == "__main__":
    main()
