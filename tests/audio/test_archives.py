"""Clips inside tar archives are read like files."""

from __future__ import annotations

import contextlib
import tarfile

import numpy as np
import pytest
import soundfile

from vita_audio.audio import AudioError, load_audio
from vita_audio.audio.archives import file_exists, file_size, read_file, stored_size
from vita_audio.audio.io import audio_duration
from vita_audio.chat import locate_file


@pytest.fixture
def archive(tmp_path):
    """An archive of ten clips, of 0.1 to 1 s, in one folder."""
    (tmp_path / "clips").mkdir()
    for number in range(1, 11):
        tone = 0.2 * np.sin(np.arange(1600 * number) / 7)
        soundfile.write(tmp_path / "clips" / f"{number}.flac", tone, 16_000)
    with tarfile.open(tmp_path / "clips.tar", "w") as tar:
        tar.add(tmp_path / "clips", "a")
    return tmp_path / "clips.tar"


def test_a_member_equals_the_file_that_went_in(archive):
    for number in range(1, 11):
        packed, plain = f"{archive}/a/{number}.flac", archive.parent / "clips" / f"{number}.flac"
        assert load_audio(packed)[0].equal(load_audio(plain)[0])
        assert audio_duration(packed) == audio_duration(plain) == number / 10
        assert file_size(packed) == file_size(plain) == plain.stat().st_size
        assert read_file(packed) == plain.read_bytes()


def test_what_caches_compare_is_the_archives_size_and_costs_no_look_into_it(archive):
    assert (
        stored_size(f"{archive}/a/1.flac") == stored_size(f"{archive}/a/none.flac") == archive.stat().st_size
    )
    plain = archive.parent / "clips" / "1.flac"
    assert stored_size(plain) == plain.stat().st_size
    with pytest.raises(OSError, match="No such file"):
        stored_size(f"{archive.parent}/lost.tar/1.flac")


def test_a_folder_that_is_named_like_an_archive_is_a_folder(archive):
    plain = archive.parent / "clips"
    plain.rename(archive.parent / "folder.tar")
    assert load_audio(archive.parent / "folder.tar" / "1.flac")[1] == 16_000


def test_faults_name_the_archive_and_the_member(archive, tmp_path):
    with pytest.raises(AudioError, match=r"clips\.tar has no member a/11\.flac") as error:
        load_audio(f"{archive}/a/11.flac")
    assert error.value.reason == "missing"
    (tmp_path / "text.tar").write_text("no archive" * 200)
    with pytest.raises(AudioError, match="not an uncompressed tar archive") as error:
        load_audio(f"{tmp_path}/text.tar/1.flac")
    assert error.value.reason == "unreadable"
    with pytest.raises(AudioError, match="no such audio file"):
        load_audio(f"{tmp_path}/lost.tar/1.flac")
    assert not file_exists(f"{archive}/a/11.flac")
    assert not file_exists(f"{tmp_path}/lost.tar/1.flac")


def test_an_archive_that_is_cut_off_loses_its_last_members_only(archive):
    content = archive.read_bytes()
    start = content.rindex(b"fLaC")  # of the last member
    archive.write_bytes(content[: start + 100])
    names = [name for name in range(1, 11) if file_exists(f"{archive}/a/{name}.flac")]
    readable = []
    for name in names:
        with contextlib.suppress(AudioError):
            readable.append(load_audio(f"{archive}/a/{name}.flac"))
    assert len(readable) == 9


def test_a_changed_archive_is_read_again(archive):
    assert not file_exists(f"{archive}/b.flac")
    with tarfile.open(archive, "a") as tar:
        tar.add(archive.parent / "clips" / "3.flac", "b.flac")
    assert audio_duration(f"{archive}/b.flac") == 0.3


def test_a_relative_path_through_an_archive_is_found_below_the_root_or_next_to_the_file(archive, tmp_path):
    assert locate_file("clips.tar/a/1.flac", tmp_path, "/elsewhere") == f"{archive}/a/1.flac"
    assert locate_file("clips.tar/a/1.flac", "/elsewhere", tmp_path) == f"{archive}/a/1.flac"
    missing = locate_file("clips.tar/a/12.flac", "/root", tmp_path)
    assert missing == f"{archive}/a/12.flac", "the archive is there; reading it says what it lacks"
    assert locate_file("lost.tar/a/1.flac", "/root", tmp_path) == "/root/lost.tar/a/1.flac"
