"""The quickstart refuses what cannot work in one line, before any work starts."""

import os
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
QUICKSTART = REPOSITORY / "scripts/quickstart.sh"


def refusal(*arguments: str, **environment: str) -> str:
    """The line that the quickstart prints when it refuses."""
    run = subprocess.run(
        ["bash", str(QUICKSTART), *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 1, run.stdout + run.stderr
    assert run.stdout == ""
    lines = run.stderr.splitlines()
    assert len(lines) == 1, run.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def test_a_folder_that_cannot_be_written(tmp_path):
    file = tmp_path / "file"
    file.touch()
    assert "cannot write there" in refusal("--out", str(file / "run"))


@pytest.mark.parametrize("minutes", ["0", "ten", "-5", "2.5"])
def test_minutes_that_are_not_a_whole_number(tmp_path, minutes):
    assert "--minutes" in refusal("--out", str(tmp_path), "--minutes", minutes)


def test_an_unknown_option_or_variant(tmp_path):
    assert "--fast" in refusal("--fast")
    assert "--variant" in refusal("--out", str(tmp_path), "--variant", "large")


def test_a_folder_that_holds_another_kind_of_run(tmp_path):
    (tmp_path / ".kind").write_text("plus-full\n")
    assert "holds a plus-full run" in refusal("--out", str(tmp_path))


def test_a_folder_that_holds_a_run_of_another_length(tmp_path):
    (tmp_path / ".kind").write_text("base-full-10-minute\n")
    assert "holds a base-full-10-minute run, this is a base-full one" in refusal("--out", str(tmp_path))
    (tmp_path / ".kind").write_text("base-full\n")
    message = refusal("--out", str(tmp_path), "--minutes", "10")
    assert "holds a base-full run, this is a base-full-10-minute one" in message


def test_too_little_disk(tmp_path):
    fake = tmp_path / "bin"
    fake.mkdir()
    df = fake / "df"
    df.write_text("#!/bin/sh\necho header\necho /dev/x 100 90 10 90% /\n")
    df.chmod(0o755)
    out = tmp_path / "out"
    assert "10 MB free" in refusal("--out", str(out), PATH=f"{fake}:{os.environ['PATH']}")


def test_no_python_that_is_recent_enough(tmp_path):
    old = "#!/bin/sh\nexit 1\n"
    fake = tmp_path / "bin"
    fake.mkdir()
    for name in ("python", "python3", "python3.11", "python3.12", "python3.13"):
        (fake / name).write_text(old)
        (fake / name).chmod(0o755)
    message = refusal("--out", str(tmp_path / "out"), PATH=f"{fake}:/usr/bin:/bin", PYTHON_BOOTSTRAP="")
    assert "Python 3.11 to 3.13 is needed" in message


def test_a_folder_in_which_another_quickstart_is_running(tmp_path):
    lock = tmp_path / ".lock"
    lock.touch()
    holder = subprocess.Popen(["flock", str(lock), "sleep", "30"])
    try:
        for _ in range(100):
            if subprocess.run(["flock", "--nonblock", str(lock), "true"], check=False).returncode:
                break
        assert "another quickstart is running" in refusal("--out", str(tmp_path))
    finally:
        holder.terminate()
        subprocess.run(["pkill", "-P", str(holder.pid)], check=False)
        holder.wait()
