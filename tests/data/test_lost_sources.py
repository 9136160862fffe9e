"""No source of a mix is lost silently: one that yields nothing stops the run, with one line that says what to do."""

from __future__ import annotations

import errno
import gzip
import json
import os
import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from disks import full_disk

from vita_audio.audio import AudioError
from vita_audio.audio.mel_vq import MelVQConfig, MelVQTokenizer
from vita_audio.data import CodecSpec, DataConfig, TooManyBadSamples, build_train_loader
from vita_audio.data.faults import MachineError, machine_fault
from vita_audio.data.mixing import Mix, MixError, read_mix
from vita_audio.data.report import FileJudge, Report
from vita_audio.data.sources import MissingSource, Rows, SourceError
from vita_audio.data.token_cache import (
    CachedClip,
    CodecIdentity,
    TokenCacheError,
    write_identity,
    write_shard,
)

GLM4VOICE = Path(__file__).resolve().parents[1] / "goldens/glm4voice/tokenizer_block20"


@pytest.fixture
def open_mix(tmp_path, goldens, arrow_cache, write_lines):
    """A loader of data sets given as lists of samples; each in a file of its name."""

    def open_mix(codec=None, **sources_and_options):
        options = {"seq_length": 128, "num_workers": 0, "open_rows": 2}
        sets = {}
        for name, value in sources_and_options.items():
            if isinstance(value, list):
                sets[name] = {"data_paths": [write_lines(tmp_path / f"{name}.jsonl", value).name]}
            else:
                options[name] = value
        (tmp_path / "mix.yaml").write_text(json.dumps({"dataset": sets}))
        config = DataConfig(tmp_path / "mix.yaml", arrow_cache=arrow_cache, **options)
        return build_train_loader(config, goldens.tokenizer("glm4voice"), codec, output_dir=tmp_path / "out")

    return open_mix


@pytest.fixture
def texts(text_sample):
    return [text_sample(f"t{index}.", "well " * 20) for index in range(400)]


def spoken(*audios: str) -> dict:
    messages = [{"role": "user", "content": "say it"}, {"role": "assistant", "content": "<|audio|>"}]
    return {"messages": messages, "audios": list(audios)}


def stopped(loader) -> str:
    with pytest.raises((TooManyBadSamples, MachineError)) as stop:
        for _ in islice(loader, 3000):
            pass
    assert "\n" not in str(stop.value)
    return str(stop.value)


# -- a source that gives nothing -----------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_mix_of_which_every_sample_is_too_long_stops_instead_of_looping(
    open_mix, text_sample, tmp_path, num_workers
):
    loader = open_mix(long=[text_sample("x", "word " * 500)] * 90, num_workers=num_workers)
    message = stopped(loader)
    assert message.startswith("long/long: all 90 samples (100.0%) read so far of ")
    assert "too_long 90" in message
    assert "raise --model_max_length, or remove the file from the mix" in message
    assert len((tmp_path / "out" / "data_errors.jsonl").read_text().splitlines()) < 1000


def test_one_file_of_a_mix_whose_samples_are_all_too_long_stops_the_run(open_mix, texts, text_sample):
    loader = open_mix(texts=texts * 3, long=[text_sample("x", "word " * 500)] * 5)
    assert stopped(loader).startswith("long/long: all 5 samples (100.0%)")


def test_missing_audio_of_a_small_source_stops_the_run_and_names_the_data_root(open_mix, texts, tmp_path):
    class Codec:
        kind = "glm4voice"

        def encode(self, audio):
            raise AudioError(f"{audio}: no such audio file", "missing")

    loader = open_mix(
        Codec(), texts=texts * 10, speech=[spoken("gone.wav")] * 100, max_audio_seconds=float("inf")
    )
    message = stopped(loader)
    assert message.startswith("speech/speech: all 64 samples (100.0%) read so far of ")
    assert "audio_missing 64; row " in message
    assert f"{tmp_path / 'gone.wav'}: no such audio file" in message
    assert "set --data_root" in message
    assert loader.report.bad / loader.report.seen < 0.05


def test_a_file_with_one_usable_sample_is_not_useless_however_many_are_too_long():
    judge = FileJudge({"a": 10_000, "b": 3})

    def report(rows, file, reason="too_long", useful=()):
        errors = [{"file": file, "row": row, "reason": reason, "source": "s", "message": "m"} for row in rows]
        return Report(errors=errors, useful_files=set(useful))

    judge.check(report(range(499), "a"))
    judge.check(report([1, 1, 1, 1, 2], "b", "bad_json"))  # one row again and again condemns no file
    judge.check(report([499], "a", useful=["a"]))
    judge.check(report(range(500, 9000), "a"))
    with pytest.raises(TooManyBadSamples, match=r"all 3 samples \(100\.0%\) read so far of b are unusable"):
        judge.check(report([0], "b", "bad_json"))


def test_bad_rows_condemn_a_file_sooner_than_long_ones():
    judge = FileJudge({"a": 10_000})
    errors = [
        {"file": "a", "row": row, "reason": "too_long", "source": "s", "message": "m"} for row in range(400)
    ]
    judge.check(Report(errors=errors))
    bad = [{**error, "reason": "bad_json", "row": 1000 + error["row"]} for error in errors]
    judge.check(Report(errors=bad[:63]))
    with pytest.raises(TooManyBadSamples, match="too_long 400, bad_json 64"):
        judge.check(Report(errors=bad[63:64]))


# -- the codec -----------------------------------------------------------------------------------------------


def test_a_wrong_codec_folder_is_refused_at_once_where_speech_is_a_small_part(open_mix, texts, tmp_path):
    (tmp_path / "base").mkdir()
    sources = {"texts": texts, "speech": [spoken("a.wav")]}
    with pytest.raises(
        ValueError, match=r"no folder is given, and the mix contains speech without precomputed codes"
    ):
        open_mix(CodecSpec("mel_vq"), **sources)
    with pytest.raises(
        ValueError,
        match=r"gone: no such folder, and the mix contains speech .*speech/speech, row 0: .*a\.wav",
    ):
        open_mix(CodecSpec("mel_vq", str(tmp_path / "gone")), **sources)
    with pytest.raises(ValueError, match=r"the mel_vq codec cannot make codes: .*; give the codec's folder"):
        open_mix(CodecSpec("mel_vq", str(tmp_path / "base")), **sources)
    open_mix(CodecSpec("mel_vq", str(tmp_path / "gone")), texts=texts)  # nobody needs it
    (tmp_path / "a_mel_vq.json").write_text("[1, 2]")
    next(iter(open_mix(CodecSpec("mel_vq", str(tmp_path / "gone")), **sources)))


def test_speech_is_noticed_anywhere_in_a_file(open_mix, texts, tmp_path):
    with pytest.raises(ValueError, match=r"mixed/mixed, row 3\d\d: "):
        open_mix(CodecSpec("mel_vq", str(tmp_path / "gone")), mixed=texts[:330] + [spoken("a.wav")] * 70)


def test_user_speech_needs_the_front_end_before_the_first_step(tmp_path, goldens, arrow_cache, write_lines):
    heard = {"messages": [{"role": "user", "content": "<|audio|>"}, {"role": "assistant", "content": "yes"}]}
    write_lines(tmp_path / "heard.jsonl", [heard | {"audios": ["a.wav"]}])
    mix = write_lines(tmp_path / "mix.yaml", ["dataset: {heard: {data_paths: [heard.jsonl]}}"])
    with pytest.raises(
        ValueError,
        match=r"no_front_end: no such folder, .*without precomputed features.*audio_model_name_or_path",
    ):
        build_train_loader(
            DataConfig(mix, arrow_cache=arrow_cache),
            goldens.tokenizer("sensevoice_glm4voice"),
            CodecSpec("sensevoice_mel_vq", frontend_path=str(tmp_path / "no_front_end")),
        )


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_codec_that_no_longer_opens_stops_the_run_and_loses_no_sample(
    open_mix, tmp_path, texts, num_workers
):
    soundfile.write(tmp_path / "a.wav", np.random.default_rng(0).standard_normal(24_000) * 0.1, 16_000)
    MelVQTokenizer.fit([str(tmp_path / "a.wav")], MelVQConfig(codebook_size=8), epochs=1).save_pretrained(
        tmp_path / "codec"
    )
    loader = open_mix(
        CodecSpec("mel_vq", str(tmp_path / "codec")),
        texts=texts[:5],
        speech=[spoken("a.wav")] * 5,
        num_workers=num_workers,
    )
    (tmp_path / "codec").rename(tmp_path / "moved")
    message = stopped(loader)
    assert "the mel_vq codec cannot make codes" in message
    assert loader.report.skipped.total() == 0


# -- the machine ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_full_disk_stops_the_run_instead_of_dropping_a_data_set(tmp_path, text_sample, write_lines, suffix):
    import datasets

    samples = [text_sample(f"{index} " * 500, "ok") for index in range(1000)]
    if suffix == "parquet":
        datasets.Dataset.from_list(samples).to_parquet(tmp_path / "a.parquet")
    else:
        write_lines(tmp_path / "a.jsonl", samples)
    write_lines(tmp_path / "small.jsonl", samples[:1])
    mix = write_lines(tmp_path / "mix.yaml", [f"dataset: {{s: {{data_paths: [small.jsonl, a.{suffix}]}}}}"])
    with full_disk(200_000), pytest.raises(MachineError) as stop:
        Mix(read_mix(mix), 0, cache_dir=str(tmp_path / "arrow"))
    assert f"a.{suffix}: cannot be opened because this machine failed: " in str(stop.value)
    assert (
        f"its Arrow copy goes to {tmp_path / 'arrow'}: free some space there, or set HF_DATASETS_CACHE"
        in str(stop.value)
    )


@pytest.mark.parametrize("place", ["/proc/arrow", "/dev/null/arrow"])
def test_an_arrow_cache_that_cannot_be_written_stops_the_run(tmp_path, text_sample, write_lines, place):
    write_lines(tmp_path / "a.jsonl", [text_sample("x")])
    with pytest.raises(MachineError, match=rf"its Arrow copy goes to {place}: free some space there"):
        Rows(tmp_path / "a.jsonl", place)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_read_only_arrow_cache_is_used_if_it_holds_the_files(
    tmp_path, text_sample, write_lines, monkeypatch, arrow_cache, suffix
):
    import datasets

    for name in ("prepared", "new"):
        samples = [text_sample(f"{name} {index}", "ok") for index in range(9)]
        write_lines(tmp_path / f"{name}.jsonl", samples)
        datasets.Dataset.from_list(samples).to_parquet(tmp_path / f"{name}.parquet")

    def read(name):
        rows = Rows(tmp_path / f"{name}.{suffix}", arrow_cache)
        return [rows[index] for index in range(len(rows))]

    expected = read("prepared")

    class Lock(datasets.builder.FileLock):
        def __init__(self, path, *args, **kwargs):
            if str(path).startswith(str(arrow_cache)):
                raise OSError(errno.EROFS, "Read-only file system", path)
            super().__init__(path, *args, **kwargs)

    monkeypatch.setattr(datasets.builder, "FileLock", Lock)
    assert read("prepared") == expected
    with pytest.raises(
        MachineError, match=rf"new\.{suffix}: .*Read-only file system; its Arrow copy goes to [^\n]+$"
    ):
        read("new")


def test_an_unreadable_file_stops_the_run(tmp_path, text_sample, write_lines, monkeypatch, arrow_cache):
    write_lines(tmp_path / "a.jsonl", [text_sample("x")])

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "a.jsonl"))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(MachineError, match=r"a\.jsonl: cannot be read: Permission denied"):
        Rows(tmp_path / "a.jsonl", arrow_cache)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EMFILE, errno.ESTALE, errno.EACCES])
@pytest.mark.parametrize("wrapped", [True, False])
def test_a_machine_fault_while_a_sample_is_read_is_not_blamed_on_the_sample(open_mix, texts, number, wrapped):
    class Codec:
        kind = "glm4voice"

        def encode(self, audio):
            try:
                raise OSError(number, "the disk is gone", audio)
            except OSError as error:
                if wrapped:
                    raise AudioError(f"{audio}: cannot be read", "unreadable") from error
                raise

    loader = open_mix(Codec(), speech=[spoken("a.wav")] * 9, texts=texts[:9], max_audio_seconds=float("inf"))
    message = stopped(loader)
    assert "because this machine failed" in message
    assert "the disk is gone" in message
    assert loader.report.skipped.total() == 0


def test_faults_of_data_are_not_faults_of_the_machine():
    for error in (ValueError("x"), FileNotFoundError(errno.ENOENT, "no such file"), OSError("corrupt data")):
        assert machine_fault(error) is None
    assert "disk space" in machine_fault(OSError("Not enough disk space. Needed: 5 GB"))


def test_running_out_of_memory_is_a_machine_fault_unless_a_header_caused_it():
    with pytest.raises(RuntimeError) as too_much:
        torch.empty(2**50)
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), too_much.value):
        assert "out of memory" in machine_fault(error)
    named = AudioError("a.wav: its header states 9000000000000 samples", "unreadable")
    named.__cause__ = MemoryError()
    assert machine_fault(named) is None


def test_damaged_codec_weights_stop_the_run_before_a_sample_is_lost(open_mix, texts, tmp_path):
    shutil.copytree(GLM4VOICE, tmp_path / "codec")
    (tmp_path / "codec" / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(
        ValueError, match=r"cannot make codes: .*model\.safetensors: .*; the mix contains speech"
    ):
        open_mix(CodecSpec("glm4voice", str(tmp_path / "codec")), texts=texts, speech=[spoken("a.wav")])


def test_a_token_cache_that_cannot_be_indexed_is_named(tmp_path, monkeypatch):
    from vita_audio.data.token_cache import TokenCache

    identity = CodecIdentity("mel_vq", "one", 8)
    write_identity(tmp_path / identity.folder_name, identity)
    write_shard(tmp_path / identity.folder_name, "x", [CachedClip("a.wav", "0", 1, 1.0, [1])])
    with pytest.raises(
        TokenCacheError, match=r"mel_vq-one: cannot be opened because this machine failed: .*free some space"
    ):
        TokenCache.find(tmp_path, "mel_vq", arrow_cache="/dev/null/arrow")


# -- formats -------------------------------------------------------------------------------------------------


def test_compressed_lines_are_samples(tmp_path, text_sample, arrow_cache):
    lines = "\n".join(json.dumps(text_sample(f"q{index}")) for index in range(20))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    rows = Rows(tmp_path / "a.jsonl.gz", arrow_cache)
    assert len(rows) == 20
    assert json.loads(rows[7])["messages"][0]["content"] == "q7"


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.xlsx", b"PK\x03\x04", r"\.xlsx files are not read; convert it"),
        ("a.csv", b"x,y\n", r"\.csv files are not read; convert it"),
        ("a.jsonl.gz", b"\x1f\x8b" + b"\0" * 50, "its compressed data is damaged"),
        ("a.parquet", b"PAR1" + b"\0" * 50, "cannot be read: ArrowInvalid"),
        ("a.json", b"[{", "starts like a JSON array but is not one"),
    ],
)
def test_a_file_that_is_there_and_cannot_be_read_is_refused_and_not_left_out(
    tmp_path, text_sample, write_lines, arrow_cache, name, content, problem
):
    write_lines(tmp_path / "good.jsonl", [text_sample("x")])
    (tmp_path / name).write_bytes(content)
    mix = write_lines(tmp_path / "mix.yaml", [f"dataset: {{s: {{data_paths: [good.jsonl, {name}]}}}}"])
    with pytest.raises(MixError, match=rf"^s: .*/{name}: {problem}"):
        Mix(read_mix(mix), 0, cache_dir=arrow_cache)


@pytest.mark.parametrize("content", ["", "\n \n", "[]"])
def test_an_empty_file_counts_as_missing(tmp_path, text_sample, write_lines, arrow_cache, caplog, content):
    write_lines(tmp_path / "good.jsonl", [text_sample("x")])
    (tmp_path / "empty.jsonl").write_text(content)
    mix = write_lines(tmp_path / "mix.yaml", ["dataset: {s: {data_paths: [good.jsonl, empty.jsonl]}}"])
    assert len(Mix(read_mix(mix), 0, cache_dir=arrow_cache)) == 1
    assert "empty.jsonl: holds no samples" in caplog.text
    with pytest.raises(MixError, match=r"empty\.jsonl: holds no samples"):
        Mix(read_mix(mix), 0, cache_dir=arrow_cache, strict=True)


def test_a_pipe_is_not_waited_for(tmp_path, arrow_cache):
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(MissingSource, match=r"pipe\.jsonl: is no regular file"):
        Rows(tmp_path / "pipe.jsonl", arrow_cache)


def test_a_parquet_path_that_datasets_would_split_is_named(tmp_path, text_sample, arrow_cache):
    import datasets

    datasets.Dataset.from_list([text_sample("x")]).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.parquet").rename(tmp_path / "a::b.parquet")
    with pytest.raises(SourceError, match=r"a::b\.parquet: .*rename it"):
        Rows(tmp_path / "a::b.parquet", arrow_cache)
