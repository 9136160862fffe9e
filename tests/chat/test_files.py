"""Sample files: what people's files hold, and where the audio that they name is found."""

from __future__ import annotations

import bz2
import errno
import gzip
import json
import lzma
import sys
from pathlib import Path

import pyarrow
import pytest

from vita_audio.chat import SampleFileError, locate_file, read_samples, sample_lines
from vita_audio.evaluation.items import read_test_set


@pytest.fixture(autouse=True)
def no_root_path(monkeypatch):
    monkeypatch.delenv("ROOT_PATH", raising=False)


@pytest.fixture
def sample_text(text_sample):
    return lambda text: json.dumps(text_sample(text), ensure_ascii=False)


def questions(path: Path) -> list[tuple[int, str]]:
    return [(number, sample.messages[0].content) for number, sample in read_samples(path)]


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_lines_keep_their_numbers_across_blank_lines(tmp_path, sample_text, line_end, mark):
    lines = ["", sample_text("héllo"), "   ", sample_text("a\u2028b"), ""]
    (tmp_path / "a.jsonl").write_bytes((mark + line_end.join(lines)).encode())
    assert questions(tmp_path / "a.jsonl") == [(2, "héllo"), (4, "a\u2028b")]


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_is_read_element_by_element(tmp_path, text_sample, mark, indent):
    text = json.dumps([text_sample("one"), text_sample("two")], indent=indent)
    (tmp_path / "a.json").write_bytes(f"{mark}\n  {text}\n".encode())
    assert questions(tmp_path / "a.json") == [(1, "one"), (2, "two")]


COMPRESSORS = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda content: pyarrow.Codec("zstd").compress(content).to_pybytes(),
}


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_compressed_files_are_read_by_their_content_under_any_suffix(tmp_path, sample_text, suffix):
    content = "\n".join(sample_text(f"question {index}") for index in range(2000)).encode()
    compressed = COMPRESSORS[suffix](content)
    assert len(compressed) < len(content)
    for name in (f"a.jsonl.{suffix}", "renamed.jsonl"):
        (tmp_path / name).write_bytes(compressed)
        assert questions(tmp_path / name)[-1] == (2000, "question 1999")
    (tmp_path / f"plain.jsonl.{suffix}").write_bytes(content)
    assert len(questions(tmp_path / f"plain.jsonl.{suffix}")) == 2000
    (tmp_path / f"cut.jsonl.{suffix}").write_bytes(compressed[: len(compressed) // 2])
    with pytest.raises(
        SampleFileError, match=rf"cut\.jsonl\.{suffix}: its compressed data is damaged or cut off"
    ):
        questions(tmp_path / f"cut.jsonl.{suffix}")


def test_zstandard_without_pyarrow_is_refused_in_one_line(tmp_path, sample_text, monkeypatch):
    (tmp_path / "a.jsonl.zst").write_bytes(COMPRESSORS["zst"](sample_text("x").encode()))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        SampleFileError, match=r"a\.jsonl\.zst: Zstandard needs pyarrow \(pip install pyarrow\)"
    ):
        questions(tmp_path / "a.jsonl.zst")


@pytest.mark.parametrize("name", ["a.xlsx", "a.csv", "a.tsv", "a.txt.gz", "a.yaml"])
def test_other_formats_are_refused_with_those_that_are_known(tmp_path, name):
    (tmp_path / name).write_bytes(b"question,answer\n")
    with pytest.raises(
        SampleFileError, match=rf"{name}: \.\w+ files are not read; convert it to one of \.jsonl, \.json"
    ):
        questions(tmp_path / name)


@pytest.mark.parametrize(("head", "kind"), [(b"PK\x03\x04", "ZIP"), (b"PAR1", "Parquet")])
def test_content_of_another_format_is_named(tmp_path, head, kind):
    (tmp_path / "a.jsonl").write_bytes(head + b"\0" * 100)
    with pytest.raises(SampleFileError, match=f"its content is .*{kind}.*, not JSON"):
        questions(tmp_path / "a.jsonl")


def test_a_line_that_is_not_utf8_is_refused_by_number_and_affects_no_other(tmp_path, sample_text):
    (tmp_path / "a.jsonl").write_bytes(
        b"\n".join([sample_text("one").encode(), b'{"messages": "\xff"', b"{}"])
    )
    assert [number for number, _ in sample_lines(tmp_path / "a.jsonl")] == [1, 2, 3]
    with pytest.raises(SampleFileError, match=r"a\.jsonl:2: not JSON"):
        questions(tmp_path / "a.jsonl")


def test_a_missing_file_a_folder_and_an_empty_file_get_different_errors(tmp_path):
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "empty.jsonl").write_bytes(b"")
    (tmp_path / "blank.jsonl").write_bytes(b"\xef\xbb\xbf\r\n \r\n")
    (tmp_path / "none.json").write_text("[]")
    for name, problem in {
        "gone.jsonl": "no such file",
        "folder.jsonl": "is a folder",
        "empty.jsonl": "holds no samples",
        "blank.jsonl": "holds no samples",
        "none.json": "holds no samples",
    }.items():
        with pytest.raises(SampleFileError, match=f"{name}: {problem}$"):
            questions(tmp_path / name)


def test_a_broken_array_is_named(tmp_path):
    (tmp_path / "a.json").write_text('[{"messages": 1},')
    with pytest.raises(SampleFileError, match=r"a\.json: starts like a JSON array but is not one"):
        questions(tmp_path / "a.json")


def test_a_file_that_cannot_be_opened_is_refused_in_one_line(tmp_path, sample_text, monkeypatch):
    (tmp_path / "a.jsonl").write_text(sample_text("x"))

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "a.jsonl"))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(SampleFileError, match=r"a\.jsonl: cannot be read: Permission denied$"):
        questions(tmp_path / "a.jsonl")


# -- where files lie -----------------------------------------------------------------------------------------


@pytest.fixture
def places(tmp_path):
    """A data root, and a folder next to the data file."""
    for folder in ("root", "beside"):
        (tmp_path / folder).mkdir()
    return tmp_path / "root", tmp_path / "beside"


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_the_data_root_comes_before_the_folder_of_the_file(places):
    root, beside = places
    touch(root / "both.wav", beside / "both.wav", beside / "only.wav")
    assert locate_file("both.wav", root, beside) == str(root / "both.wav")
    assert locate_file("only.wav", root, beside) == str(beside / "only.wav")
    assert locate_file("gone.wav", root, beside) == str(root / "gone.wav")
    assert locate_file(str(beside / "only.wav"), root, beside) == str(beside / "only.wav")
    assert locate_file("/gone.wav", root, beside) == "/gone.wav"


def test_datasets_below_the_root_also_means_its_data_folder(places):
    root, beside = places
    touch(root / "data" / "a.wav", beside / "datasets" / "b.wav")
    assert locate_file("datasets/a.wav", root, beside) == str(root / "data" / "a.wav")
    assert locate_file("datasets/b.wav", root, beside) == str(beside / "datasets" / "b.wav")
    assert locate_file("datasets/gone.wav", root, beside) == str(root / "data" / "gone.wav")
    touch(root / "datasets" / "a.wav")
    assert locate_file("datasets/a.wav", root, beside) == str(root / "datasets" / "a.wav")
    assert locate_file("datasets/gone.wav", root, beside) == str(root / "datasets" / "gone.wav")


def spoken(*audios: str) -> str:
    user = {"role": "user", "content": "<|audio|>" * len(audios)}
    return json.dumps({"messages": [user, {"role": "assistant", "content": "yes"}], "audios": audios})


@pytest.mark.parametrize("given", [True, False])
def test_test_sets_follow_the_same_rule(places, given, monkeypatch):
    root, beside = places
    touch(root / "both.wav", beside / "both.wav", beside / "only.wav", root / "data" / "a.wav")
    (beside / "test.jsonl").write_text(spoken("both.wav", "only.wav", "datasets/a.wav"))
    if not given:
        monkeypatch.setenv("ROOT_PATH", str(root))
    expected = tuple(map(str, (root / "both.wav", beside / "only.wav", root / "data" / "a.wav")))
    [(_, sample)] = read_samples(beside / "test.jsonl", root if given else None)
    assert sample.audios == expected
    [item] = read_test_set(beside / "test.jsonl", root if given else None)
    assert item.conversation.audios == expected


def test_without_a_root_audio_paths_are_relative_to_the_file(places):
    _, beside = places
    (beside / "test.jsonl").write_text(spoken("gone.wav"))
    [(_, sample)] = read_samples(beside / "test.jsonl")
    assert sample.audios == (str(beside / "gone.wav"),)
