"""Files are whole or absent, whenever the writer dies."""

import json
import os
import signal
import subprocess
import sys

import pytest

from vita_audio.files import (
    read_json,
    read_json_lines,
    whole_file,
    write_bytes,
    write_json,
    write_json_lines,
    write_text,
)


def test_a_file_is_written_with_the_folders_above_it(tmp_path):
    write_text(tmp_path / "a" / "b.txt", "two\nlines ü")
    assert (tmp_path / "a" / "b.txt").read_text(encoding="utf-8") == "two\nlines ü"
    write_bytes(tmp_path / "a" / "b.txt", b"again")
    assert (tmp_path / "a" / "b.txt").read_bytes() == b"again"
    assert os.listdir(tmp_path / "a") == ["b.txt"]


def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(tmp_path):
    write_text(tmp_path / "scores.json", "old")
    with pytest.raises(RuntimeError), whole_file(tmp_path / "scores.json") as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise RuntimeError
    with pytest.raises(TypeError):
        write_json(tmp_path / "scores.json", {"a": object()})
    assert (tmp_path / "scores.json").read_text() == "old"
    assert os.listdir(tmp_path) == ["scores.json"]


def test_a_writer_that_is_killed_leaves_the_old_file(tmp_path):
    write_text(tmp_path / "log.txt", "old")
    program = (
        "import os, signal, sys\nfrom vita_audio.files import whole_file\n"
        "with whole_file(sys.argv[1]) as temporary:\n"
        "    temporary.write_text('half')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    run = subprocess.run([sys.executable, "-c", program, tmp_path / "log.txt"], check=False)
    assert run.returncode == -signal.SIGKILL
    assert (tmp_path / "log.txt").read_text() == "old"


def test_two_writers_of_one_file_do_not_share_a_temporary_file(tmp_path):
    with whole_file(tmp_path / "x") as first, whole_file(tmp_path / "x") as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert (tmp_path / "x").read_text() == "first"


def test_json_lines_survive_lone_surrogates(tmp_path):
    values = [{"text": "线\u2028x"}, {"text": "\ud83d"}, [1, None]]
    write_json_lines(tmp_path / "a.jsonl", values)
    assert list(read_json_lines(tmp_path / "a.jsonl")) == values
    assert "线" in (tmp_path / "a.jsonl").read_text(encoding="utf-8")


def test_a_damaged_line_is_named_by_file_and_number(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n\n{"a": \n')
    with pytest.raises(ValueError, match=r"a\.jsonl:3: not valid JSON"):
        list(read_json_lines(tmp_path / "a.jsonl"))


def test_a_damaged_json_file_is_named(tmp_path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match=r"a\.json: not valid JSON"):
        read_json(tmp_path / "a.json")
    write_json(tmp_path / "a.json", {"a": [1]})
    assert read_json(tmp_path / "a.json") == json.loads((tmp_path / "a.json").read_text()) == {"a": [1]}
