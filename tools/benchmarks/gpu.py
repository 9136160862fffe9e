"""Everything that needs a GPU, in one run and one file; ``bash scripts/test_gpu.sh`` starts it.

First the tests marked ``gpu``, for ten minutes at most. Then the benchmarks at 7B shapes: decoding in every mode with
the engine and without, and a training step of each kind with four of the 28 layers, which fit one card. A part that
fails is noted, and the others run. The result is FOLDER/gpu.json: card, versions, and command, status,
seconds and figures of each part.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from vita_audio.cli.arguments import command_parser
from vita_audio.files import write_json
from vita_audio.provenance import versions

ROOT = Path(__file__).resolve().parents[2]
TEST_SECONDS = 600
SHAPES_7B = (
    "--hidden 3584 --intermediate 18944 --layers 4 --vocab 168072 --seq 8192 --dtype bfloat16 --steps 5"
)


@dataclass(frozen=True)
class Part:
    """One command.

    Attributes:
        name: in the result.
        words: after ``python``.
        seconds: the longest it may take.
        results: JUnit file that it writes, if its figures are those of tests; else its last line of JSON counts.
    """

    name: str
    words: list[str]
    seconds: int = 1800
    results: Path | None = None


def parts(folder: Path) -> list[Part]:
    """What is run, in order."""
    junit = folder / "tests.xml"
    decode = "--sizes 7b --tokens 264 --rows 1 4 8".split()
    pictures = ["--png", str(folder / "decode-7b.png"), "--json", str(folder / "decode-7b.json")]
    tests = ["-m", "pytest", "-m", "gpu", "tests", f"--junitxml={junit}"]
    benchmark = str(ROOT / "tools/benchmark.py")
    steps = [
        Part(
            f"train-step, stage {stage}", [benchmark, "train-step", "--stage", str(stage), *SHAPES_7B.split()]
        )
        for stage in (1, 3, 4)
    ]
    return [
        Part("tests", tests, TEST_SECONDS, junit),
        Part("decode, 7B", [benchmark, "decode", *decode, *pictures]),
        *steps,
    ]


def main(argv: list[str]) -> None:
    """Run all parts.

    Raises:
        SystemExit: status 1 if a part has failed.
    """
    parser = command_parser(__doc__, prog="benchmark.py gpu")
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), metavar="FOLDER")
    folder = parser.parse_args(argv).out
    folder.mkdir(parents=True, exist_ok=True)
    failed = run_parts(parts(folder), folder / "gpu.json")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; see {folder / 'gpu.json'}")


def run_parts(wanted: list[Part], file: Path) -> list[str]:
    """Run commands one after the other and write what they gave, after each; returns the names of those that failed."""
    result: dict[str, Any] = {"versions": versions(), "card": card(), "parts": {}}
    for part in wanted:
        print(f"== {part.name}", flush=True)
        result["parts"][part.name] = run_part(part)
        write_json(file, result)
    return [name for name, figures in result["parts"].items() if figures["status"] != "ok"]


def run_part(part: Part) -> dict[str, Any]:
    """Status, seconds and figures of one command."""
    start = time.perf_counter()
    status, printed = "ok", ""
    try:
        run = subprocess.run(
            [sys.executable, *part.words],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            timeout=part.seconds,
            check=False,
        )
        printed = run.stdout
        status = "ok" if run.returncode == 0 else f"ended with status {run.returncode}"
    except subprocess.TimeoutExpired:
        status = f"took more than {part.seconds} s"
    print(printed, end="", flush=True)
    seconds = round(time.perf_counter() - start, 1)
    figures = counts(part.results) if part.results is not None else last_json(printed)
    if status == "ok" and figures is None:
        status = "printed no figures"
    return {"command": part.words, "status": status, "seconds": seconds, "figures": figures}


def counts(junit: Path) -> dict[str, int] | None:
    """Tests, failures, errors and skips of a JUnit file; None if there is none."""
    if not junit.is_file():
        return None
    suites = list(ElementTree.parse(junit).getroot().iter("testsuite"))
    names = ("tests", "failures", "errors", "skipped")
    return {name: sum(int(suite.get(name, 0)) for suite in suites) for name in names}


def last_json(printed: str) -> Any:
    """The last line that is a JSON object; None if there is none."""
    for line in reversed(printed.splitlines()):
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            return value
    return None


def card() -> str | None:
    """Name and memory of the GPU; None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return f"{properties.name}, {properties.total_memory / 1e9:.0f} GB"
