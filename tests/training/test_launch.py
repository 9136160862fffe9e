"""The launcher prints a refusal once, and leaves no process behind when it is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
LAUNCHER = REPOSITORY / "vita_audio" / "cli" / "launch.py"
pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="Linux alone tells a process of its parent's death"
)


def launcher(*command, processes=2):
    return [
        sys.executable,
        str(LAUNCHER),
        "--standalone",
        "--nproc_per_node",
        str(processes),
        *map(str, command),
    ]


@pytest.fixture
def script(tmp_path):
    """Write a command that imports nothing but the launcher's module; returns its path."""

    def write(body):
        path = tmp_path / "command.py"
        path.write_text(
            f"import os, sys, time\nsys.path.insert(0, {str(LAUNCHER.parent)!r})\nimport launch\n{body}\n"
        )
        return path

    return write


def run(*command, **options):
    return subprocess.run(
        launcher(*command, **options), capture_output=True, text=True, timeout=120, check=False
    )


def test_a_refusal_of_all_processes_is_printed_once_and_nothing_else(script):
    ended = run(script("launch.refuse('finetune_sts: --max_steps 0: give a number')"), processes=3)
    assert ended.stderr == "finetune_sts: --max_steps 0: give a number\n"
    assert ended.returncode == 78


def test_a_refusal_of_one_process_ends_the_others(script):
    ended = run(
        script("if os.environ['RANK'] == '1':\n    launch.refuse('no codec here')\ntime.sleep(600)"),
        processes=3,
    )
    assert ended.stderr == "no codec here\n"
    assert ended.returncode == 78


def test_without_the_launcher_a_refusal_is_printed_to_standard_error(script):
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("TORCHELASTIC", "VITA_"))
    }
    command = [sys.executable, script("launch.refuse('no')")]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (ended.stderr, ended.returncode) == ("no\n", 78)


def test_a_plain_torchrun_gets_the_message_on_standard_error(script):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        script("launch.refuse('no good')"),
    ]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert "no good\n" in ended.stderr
    assert ended.returncode != 0


def test_an_unexpected_error_keeps_its_traceback_and_the_launcher_adds_one_line(script):
    ended = run(script("raise KeyError('lost')"), processes=1)
    lines = ended.stderr.splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-2:] == [
        "KeyError: 'lost'",
        "launch: process 0 ended with status 1; see its output above",
    ]
    assert ended.returncode == 1


def test_arguments_and_modules_reach_the_command_unchanged(script, tmp_path):
    path = script("print(sys.argv[1:], os.environ['RANK'], flush=True)")
    assert run(path, "--a", "b c", "-m", processes=1).stdout == "['--a', 'b c', '-m'] 0\n"
    ended = subprocess.run(
        launcher("-m", "command", "x", processes=1),
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.stdout == "['x'] 0\n", ended.stderr


def test_a_stopped_launcher_stops_its_processes_and_reports_it_in_one_line(script, tmp_path, processes):
    process = subprocess.Popen(
        launcher(
            script("open(sys.argv[1] + os.environ['RANK'], 'w').close(); time.sleep(600)"),
            f"{tmp_path}/started",
        ),
        stderr=subprocess.PIPE,
        text=True,
    )
    processes.wait_for(lambda: len(list(tmp_path.glob("started*"))) == 2)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert error == "launch: stopped by SIGTERM\n"
    processes.wait_for(lambda: not processes.of(tmp_path))


# From before the first process exists to long after all have started.
@pytest.mark.parametrize(
    "moment", ["at the first child", "a moment later", "at the first line", "when all run"]
)
def test_no_process_outlives_a_launcher_that_is_killed(script, tmp_path, moment, processes):
    path = script("open(sys.argv[1] + os.environ['RANK'], 'w').close(); time.sleep(600)")
    process = subprocess.Popen(launcher(path, f"{tmp_path}/started"), stderr=subprocess.DEVNULL)
    if moment in ("at the first child", "a moment later"):
        processes.wait_for(lambda: processes.children(process.pid))
        time.sleep(0.03 if moment == "a moment later" else 0)
    else:
        processes.wait_for(
            lambda: len(list(tmp_path.glob("started*"))) >= (1 if moment == "at the first line" else 2)
        )
    process.kill()
    process.wait()
    processes.wait_for(lambda: not processes.of(tmp_path))


def test_a_process_whose_launcher_died_early_exits_at_once(script):
    path = script("launch.end_with_launcher(); print('still here')")
    environment = {**os.environ, "TORCHELASTIC_RUN_ID": "x", launcher_variable(): "1"}
    ended = subprocess.run(
        [sys.executable, path], env=environment, capture_output=True, text=True, check=False
    )
    assert (ended.stdout, ended.returncode) == ("", 1)


def launcher_variable():
    from vita_audio.cli.launch import LAUNCHER_VARIABLE

    return LAUNCHER_VARIABLE
