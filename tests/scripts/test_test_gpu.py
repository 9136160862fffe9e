"""scripts/test_gpu.sh without a GPU: its refusal, its flow with a stand-in, and the file that it leaves."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STAND_IN = """#!/bin/sh
echo "$@" >>"$NOTES"
case "$1" in -c) exit "$CUDA_MISSING" ;; esac
"""


@pytest.fixture
def gpu(monkeypatch):
    specification = importlib.util.spec_from_file_location("gpu_benchmark", ROOT / "tools/benchmarks/gpu.py")
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "gpu_benchmark", module)
    specification.loader.exec_module(module)
    return module


def script(folder: Path, missing: str, *words: str) -> tuple[subprocess.CompletedProcess, list[str]]:
    """The script in an environment that is prepared already, whose Python is a stand-in."""
    binaries = folder / "venv/bin"
    binaries.mkdir(parents=True)
    (binaries / "python").write_text(STAND_IN)
    (binaries / "python").chmod(0o755)
    files = [ROOT / name for name in ("setup.py", "scripts/environment.sh", "constraints-cpu.txt")]
    stamp = subprocess.run(
        ["cksum"], input=b"".join(map(Path.read_bytes, files)), capture_output=True, check=True
    )
    (folder / "venv/.installed-dev").write_bytes(stamp.stdout)
    notes = folder / "notes"
    run = subprocess.run(
        ["bash", str(ROOT / "scripts/test_gpu.sh"), *words],
        env={**os.environ, "VENV": str(folder / "venv"), "NOTES": str(notes), "CUDA_MISSING": missing},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return run, notes.read_text().splitlines()


def test_without_a_gpu_it_says_so_in_one_line(tmp_path):
    run, calls = script(tmp_path, "1")
    assert run.returncode == 1
    assert run.stderr.strip() == "error: no CUDA device; scripts/test.sh runs the tests of the CPU"
    assert len(calls) == 1


def test_with_one_everything_is_run_into_the_named_folder(tmp_path):
    run, calls = script(tmp_path, "0", "results")
    assert run.returncode == 0, run.stderr
    assert calls[1:] == [f"tools/benchmark.py gpu --out {tmp_path / 'results'}"]


def test_the_parts_are_the_marked_tests_and_the_benchmarks_at_7b(gpu, tmp_path):
    found = {part.name: part for part in gpu.parts(tmp_path)}
    assert list(found) == ["tests", "decode, 7B", *(f"train-step, stage {stage}" for stage in (1, 3, 4))]
    assert found["tests"].words[:4] == ["-m", "pytest", "-m", "gpu"]
    assert found["tests"].seconds == 600
    assert "3584" in found["train-step, stage 4"].words


def test_one_file_holds_every_part_and_a_failure_stops_no_other(gpu, tmp_path):
    junit = tmp_path / "tests.xml"
    write = (
        f"open({str(junit)!r}, 'w').write('<testsuites><testsuite tests=\"5\" failures=\"1\"/></testsuites>')"
    )
    wanted = [
        gpu.Part("tests", ["-c", write], results=junit),
        gpu.Part("breaks", ["-c", "raise SystemExit(3)"]),
        gpu.Part("hangs", ["-c", "import time; time.sleep(60)"], seconds=1),
        gpu.Part("silent", ["-c", "print('no figures')"]),
        gpu.Part("measures", ["-c", "print('a table'); print('{\"mfu\": 0.5}')"]),
    ]
    failed = gpu.run_parts(wanted, tmp_path / "gpu.json")
    assert failed == ["breaks", "hangs", "silent"]
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert result["parts"]["tests"]["figures"] == {"tests": 5, "failures": 1, "errors": 0, "skipped": 0}
    assert result["parts"]["breaks"]["status"] == "ended with status 3"
    assert result["parts"]["hangs"]["status"] == "took more than 1 s"
    assert result["parts"]["measures"]["figures"] == {"mfu": 0.5}
    assert "torch" in result["versions"]
