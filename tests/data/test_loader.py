"""The loader: full rows, the same for a seed, resumed to the row, with good samples and bad."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from vita_audio.chat import ChatTokens
from vita_audio.constants import IGNORE_INDEX
from vita_audio.data import CodecSpec, DataConfig, TooManyBadSamples, build_example, build_train_loader
from vita_audio.data.mixing import Mix, read_mix

SAMPLES_PER_FILE = 300


@pytest.fixture(scope="module")
def mix_file(tmp_path_factory, text_sample, write_lines):
    """Two files of text samples of many lengths; each sample names itself."""
    folder = tmp_path_factory.mktemp("loader")
    for name in "ab":
        samples = [
            text_sample(f"{name}{index}.", "hey " * (1 + index * 7 % 50)) for index in range(SAMPLES_PER_FILE)
        ]
        write_lines(folder / f"{name}.jsonl", samples)
    return write_lines(
        folder / "mix.yaml", ["dataset: {a: {data_paths: [a.jsonl]}, b: {data_paths: [b.jsonl]}}"]
    )


@pytest.fixture
def open_loader(mix_file, goldens, arrow_cache):
    def open_loader(rank: int = 0, world_size: int = 1, seed: int = 42, dataset_path=mix_file, **options):
        output_dir, codec = options.pop("output_dir", None), options.pop("codec", None)
        options = {"seq_length": 512, "num_workers": 0, "open_rows": 4, **options}
        return build_train_loader(
            DataConfig(dataset_path, arrow_cache=arrow_cache, **options),
            goldens.tokenizer("glm4voice"),
            codec,
            rank=rank,
            world_size=world_size,
            seed=seed,
            output_dir=output_dir,
        )

    return open_loader


@pytest.fixture(scope="module")
def names(goldens):
    """The samples of a batch, by the names that they carry."""
    tokenizer = goldens.tokenizer("glm4voice")

    def names(batch: dict) -> list[str]:
        text = tokenizer.decode(batch["input_ids"].flatten())
        return [part.split(".")[0] for part in text.split("<|im_start|>user\n")[1:]]

    return names


def test_rows_are_whole_documents_with_their_own_positions_and_padding_last(open_loader, goldens):
    tokenizer = goldens.tokenizer("glm4voice")
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    for batch in islice(open_loader(micro_batch_size=2), 20):
        assert batch["input_ids"].shape == batch["labels"].shape == batch["position_ids"].shape == (2, 512)
        for ids, labels, positions in zip(
            *(batch[name] for name in ("input_ids", "labels", "position_ids")), strict=True
        ):
            documents = (positions == 0).nonzero().flatten()
            assert (ids[documents] == start).all()
            assert (labels[documents] == IGNORE_INDEX).all()
            padding = ids == tokenizer.pad_token_id
            length = int((~padding).sum())
            assert padding[length:].all()
            assert (labels[length:] == IGNORE_INDEX).all()


def test_the_stream_is_almost_free_of_padding(open_loader, goldens):
    pad = goldens.tokenizer("glm4voice").pad_token_id
    batches = list(islice(open_loader(open_rows=16), 100))
    padded = sum(int((batch["input_ids"] == pad).sum()) for batch in batches)
    assert 1 - padded / (100 * 512) >= 0.98  # documents are a tenth of these short rows


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_same_seed_gives_the_same_rows(open_loader, row_hash, num_workers):
    def hashes(seed: int) -> list[str]:
        return [row_hash(batch) for batch in islice(open_loader(seed=seed, num_workers=num_workers), 12)]

    assert hashes(1) == hashes(1) != hashes(2)


@pytest.mark.parametrize(
    ("num_workers", "micro_batch_size", "steps"), [(0, 1, 0), (0, 1, 17), (0, 3, 25), (2, 1, 17), (3, 2, 40)]
)
def test_a_resumed_loader_continues_with_the_same_rows(
    open_loader, row_hash, num_workers, micro_batch_size, steps
):
    options = {"num_workers": num_workers, "micro_batch_size": micro_batch_size, "rank": 1, "world_size": 2}
    uninterrupted = iter(open_loader(**options))
    expected = [row_hash(next(uninterrupted)) for _ in range(steps + 30)]  # crosses an epoch's end

    first = open_loader(**options)
    seen = [row_hash(batch) for batch in islice(first, steps)]
    state = json.loads(json.dumps(first.state_dict()))
    second = open_loader(**options)
    second.load_state_dict(state)
    seen += [row_hash(batch) for batch in islice(second, 11)]
    third = open_loader(**options)
    third.load_state_dict(second.state_dict())
    seen += [row_hash(batch) for batch in islice(third, 19)]
    assert seen == expected
    counted = open_loader(**options)
    list(islice(counted, steps + 30))
    assert third.counts() == counted.counts()


def test_the_state_describes_the_batches_received_and_is_small(open_loader):
    loader = open_loader(num_workers=2)
    next(islice(loader, 20, 21))
    assert len(json.dumps(loader.state_dict())) < 6_000


@pytest.mark.parametrize(
    ("before", "after"), [((2, 2), (1, 1)), ((1, 0), (3, 2)), ((2, 0), (4, 0)), ((2, 3), (2, 1))]
)
def test_on_other_ranks_and_workers_no_sample_is_repeated_or_lost(open_loader, names, before, after):
    """Two epochs, with a change of (world size, workers) in the first."""
    world_size, workers = before
    loaders = [open_loader(rank, world_size, num_workers=workers) for rank in range(world_size)]
    seen = Counter()
    for rank, loader in enumerate(loaders):
        for batch in islice(loader, 5 + 3 * rank):  # ranks may be apart
            seen.update(names(batch))
    assert max(seen.values()) == 1
    states = [loader.state_dict() for loader in loaders]

    world_size, workers = after
    loaders = [open_loader(rank, world_size, num_workers=workers) for rank in range(world_size)]
    for rank, loader in enumerate(loaders):
        same_world = len(states) == world_size
        loader.load_state_dict(states[rank] if same_world else states)
    streams = [iter(loader) for loader in loaders]
    while len(seen) < 2 * SAMPLES_PER_FILE:
        for stream in streams:
            seen.update(names(next(stream)))
        assert max(seen.values()) <= 2, "a sample was repeated before the epoch was over"
    epochs = [loader.counts()["epoch"] for loader in loaders]
    assert max(epochs) < 2.2
    assert sum(loader.report.used.total() for loader in loaders) >= seen.total()


def test_all_ranks_and_workers_share_an_epoch_without_overlap(open_loader, names):
    streams = [iter(open_loader(rank, 3, num_workers=2 * (rank == 0))) for rank in range(3)]
    seen = Counter(name for stream in streams for _ in range(3) for name in names(next(stream)))
    assert set(seen.values()) == {1}
    assert len(seen) > 50


@pytest.mark.parametrize("after", [1, 2, 3])
def test_counters_are_kept_once_when_a_run_is_resumed_on_other_ranks(open_loader, after):
    before = [open_loader(rank, 2) for rank in range(2)]
    for loader in before:
        list(islice(loader, 7))
    used = sum(loader.report.used.total() for loader in before)
    states = [loader.state_dict() for loader in before]
    resumed = [open_loader(rank, after) for rank in range(after)]
    for loader in resumed:
        loader.load_state_dict(states)
    assert sum(loader.report.used.total() for loader in resumed) == used
    assert max(loader.counts()["epoch"] for loader in resumed) == max(
        loader.counts()["epoch"] for loader in before
    )


def test_a_document_of_exactly_the_length_of_a_row_is_used(
    open_loader, tmp_path, text_sample, write_lines, goldens
):
    sample = text_sample("exact.", "hey " * 30)
    length = len(build_example(sample, goldens.tokenizer("glm4voice"), None))
    write_lines(tmp_path / "a.jsonl", [sample])
    mix = write_lines(tmp_path / "mix.yaml", ["dataset: {s: {data_paths: [a.jsonl]}}"])
    batch = next(iter(open_loader(dataset_path=mix, seq_length=length)))
    assert (batch["position_ids"][0] == torch.arange(length)).all()
    with pytest.raises(TooManyBadSamples, match=f"{length} tokens, but a row holds {length - 1}"):
        next(iter(open_loader(dataset_path=mix, seq_length=length - 1)))


class FoundCodec:
    """One code, and notes of what it was asked for."""

    kind = "glm4voice"

    def __init__(self) -> None:
        self.asked: list[str] = []

    def encode(self, audio: str) -> list[int]:
        self.asked.append(audio)
        return [1]


def spoken(audio: str) -> dict:
    messages = [{"role": "user", "content": "say it"}, {"role": "assistant", "content": "<|audio|>"}]
    return {"messages": messages, "audios": [audio]}


@pytest.mark.parametrize("below_root", [True, False])
def test_audio_below_the_data_root_takes_precedence_over_audio_next_to_the_file(
    open_loader, tmp_path, write_lines, below_root
):
    root, beside = tmp_path / "root", tmp_path / "beside"
    root.mkdir()
    write_lines(beside / "a.jsonl", [spoken("clip.wav")])
    mix = write_lines(tmp_path / "mix.yaml", [f"dataset: {{s: {{data_paths: [{beside / 'a.jsonl'}]}}}}"])
    for folder in [root, beside] if below_root else [beside]:
        soundfile.write(folder / "clip.wav", np.zeros(1600), 16_000)
    codec = FoundCodec()
    next(iter(open_loader(dataset_path=mix, codec=codec, data_root=root)))
    assert set(codec.asked) == {str((root if below_root else beside) / "clip.wav")}


def test_a_clip_may_fill_a_row_at_twelve_and_a_half_codes_per_second(
    open_loader, tmp_path, write_lines, text_sample
):
    for name, seconds in (("fits", 7.9), ("long", 8.1)):
        soundfile.write(tmp_path / f"{name}.wav", np.zeros(int(seconds * 8000)), 8000)
    write_lines(tmp_path / "a.jsonl", [spoken("fits.wav")] * 10 + [spoken("long.wav")] * 20)
    mix = write_lines(tmp_path / "mix.yaml", ["dataset: {s: {data_paths: [a.jsonl]}}"])
    codec = FoundCodec()
    loader = open_loader(dataset_path=mix, codec=codec, seq_length=100)
    list(islice(loader, 30))  # two thirds are too long, which is no fault of the data
    assert set(codec.asked) == {str(tmp_path / "fits.wav")}
    assert set(loader.report.skipped) == {("s/a", "audio_too_long")}
    assert loader.report.bad == 0


def test_codes_that_the_tokenizer_does_not_know_are_bad_codes(open_loader, tmp_path, write_lines, goldens):
    size = ChatTokens.of(goldens.tokenizer("glm4voice")).codebook_size
    for name, code in (("last", size - 1), ("beyond", size)):
        (tmp_path / f"{name}_glm4voice.json").write_text(json.dumps([0, code]))
    write_lines(tmp_path / "a.jsonl", [spoken("last.wav"), spoken("beyond.wav")])
    mix = write_lines(tmp_path / "mix.yaml", ["dataset: {s: {data_paths: [a.jsonl]}}"])
    loader = open_loader(dataset_path=mix, codec=CodecSpec("glm4voice"), seq_length=32, max_error_share=1)
    list(islice(loader, 5))
    assert set(loader.report.skipped) == {("s/a", "bad_codes")}
    assert abs(loader.report.used.total() - loader.report.skipped.total()) <= 1


def test_states_of_another_run_are_refused_in_one_line(open_loader, mix_file):
    state = open_loader(0, 2).state_dict()
    with pytest.raises(ValueError, match="another data mix or seed"):
        open_loader(0, 2, seed=7).load_state_dict(state)
    with pytest.raises(ValueError, match="another row length"):
        open_loader(0, 2, seq_length=256).load_state_dict(state)
    with pytest.raises(ValueError, match="states of all ranks"):
        open_loader(0, 3).load_state_dict(state)
    with pytest.raises(ValueError, match="states of all ranks"):
        open_loader(0, 3).load_state_dict([state])


def test_a_file_whose_content_changed_is_named_on_resume(open_loader, mix_file, tmp_path):
    folder = shutil.copytree(mix_file.parent, tmp_path / "mix")
    before = open_loader(dataset_path=folder / mix_file.name)
    state = before.state_dict()
    file = folder / "b.jsonl"
    file.write_text(file.read_text().replace("b7.", "b8.", 1))
    after = open_loader(dataset_path=folder / mix_file.name)
    assert after.mix.fingerprint != before.mix.fingerprint
    with pytest.raises(ValueError, match=rf"^{file}: its content has changed since [^\n]+$"):
        after.load_state_dict(state)
    del state["contents"]  # as in checkpoints of earlier versions
    after.load_state_dict(state)


CONSUMER = """
import hashlib, json, multiprocessing, sys, time
from pathlib import Path
from transformers import AutoTokenizer
from vita_audio.data import DataConfig, build_train_loader

def main():
    mix, tokenizer, cache, state_file, log, rank = sys.argv[1:]
    loader = build_train_loader(
        DataConfig(mix, seq_length=512, num_workers=1, open_rows=4, arrow_cache=cache),
        AutoTokenizer.from_pretrained(tokenizer), None, rank=int(rank), world_size=2, seed=42)
    state_file, step = Path(state_file), 0
    if state_file.exists():
        saved = json.loads(state_file.read_text())
        loader.load_state_dict(saved["state"])
        step = saved["step"]
    batches = iter(loader)
    with open(log, "a") as lines:
        while step < 60:
            batch = next(batches)
            names = ("input_ids", "labels", "position_ids")
            row = hashlib.sha1(b"".join(batch[name].numpy().tobytes() for name in names)).hexdigest()
            print(step, row, file=lines, flush=True)
            if step == 0:
                workers = [process.pid for process in multiprocessing.active_children()]
                state_file.with_suffix(".workers").write_text(json.dumps(workers))
            step += 1
            if step % 5 == 0:
                temporary = state_file.with_suffix(".tmp")
                temporary.write_text(json.dumps({"step": step, "state": loader.state_dict()}))
                temporary.replace(state_file)
            time.sleep(0.05)  # leaves the test time to kill it halfway

if __name__ == "__main__":
    main()
"""


@pytest.mark.slow
def test_two_killed_processes_resume_and_give_the_rows_of_an_uninterrupted_run(
    mix_file, goldens, arrow_cache, open_loader, row_hash, tmp_path
):
    script = tmp_path / "consume.py"
    script.write_text(CONSUMER)
    logs = [tmp_path / f"{rank}.log" for rank in range(2)]

    def start(rank: int) -> subprocess.Popen:
        arguments = [mix_file, goldens.folder / "tokenizer" / "glm4voice", arrow_cache]
        arguments += [tmp_path / f"{rank}.json", logs[rank], rank]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
        return subprocess.Popen([sys.executable, script, *map(str, arguments)], env=environment)

    def lines(rank: int) -> list[str]:
        return logs[rank].read_text().splitlines() if logs[rank].exists() else []

    for rank, process in enumerate([start(0), start(1)]):
        while len(lines(rank)) < 13 + 9 * rank and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "the process was over before it could be killed"
    for rank in range(2):
        workers = json.loads((tmp_path / f"{rank}.workers").read_text())
        deadline = time.monotonic() + 20
        while any(Path(f"/proc/{worker}").exists() for worker in workers):
            assert time.monotonic() < deadline, "a killed trainer left its workers behind"
            time.sleep(0.05)
        assert workers
    assert [process.wait(timeout=240) for process in [start(0), start(1)]] == [0, 0]
    for rank in range(2):
        whole = islice(open_loader(rank, 2, num_workers=1), 60)
        expected = {f"{step} {row_hash(batch)}" for step, batch in enumerate(whole)}
        assert set(lines(rank)) == expected


def test_bad_samples_are_counted_by_source_and_reason_and_written_down(
    open_loader, tmp_path, text_sample, write_lines
):
    good = [text_sample(f"g{index}.") for index in range(200)]
    write_lines(tmp_path / "good.jsonl", good)
    write_lines(
        tmp_path / "bad.jsonl", ["{broken", json.dumps({"messages": []}), text_sample("x" * 5000), *good]
    )
    mix = write_lines(
        tmp_path / "mix.yaml", ["dataset: {good: {data_paths: [good.jsonl]}, bad: {data_paths: [bad.jsonl]}}"]
    )
    loader = open_loader(dataset_path=mix, output_dir=tmp_path / "out")
    stream = iter(loader)
    while loader.counts().get("epoch", 0) < 1:
        next(stream)
    skipped = dict(loader.report.skipped)
    assert set(skipped) == {("bad/bad", "bad_json"), ("bad/bad", "no_messages"), ("bad/bad", "too_long")}
    assert loader.counts()["skipped"] == sum(skipped.values())
    lines = [json.loads(line) for line in (tmp_path / "out" / "data_errors.jsonl").read_text().splitlines()]
    assert len(lines) == sum(skipped.values())
    broken = next(line for line in lines if line["reason"] == "bad_json")
    assert broken["file"] == str(tmp_path / "bad.jsonl")
    assert broken["row"] == 0
    assert "{broken" in broken["message"]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_mix_with_too_many_bad_samples_stops_with_a_summary(
    open_loader, tmp_path, text_sample, write_lines, num_workers
):
    write_lines(tmp_path / "bad.jsonl", ["{broken"] * 20 + [text_sample("fine")] * 80)
    mix = write_lines(tmp_path / "mix.yaml", ["dataset: {s: {data_paths: [bad.jsonl]}}"])
    with pytest.raises(
        TooManyBadSamples, match=r"(?s)unusable, the limit is 5\.0%.*s/bad: \d+ used, skipped: bad_json"
    ):
        for _ in islice(open_loader(dataset_path=mix, num_workers=num_workers), 500):
            pass
    relaxed = open_loader(dataset_path=mix, num_workers=num_workers, max_error_share=0.3)
    assert len(list(islice(relaxed, 30))) == 30


def test_a_mix_without_one_good_sample_stops_too(open_loader, tmp_path, write_lines):
    write_lines(tmp_path / "bad.jsonl", ["{broken"] * 70)
    mix = write_lines(tmp_path / "mix.yaml", ["dataset: {s: {data_paths: [bad.jsonl]}}"])
    with pytest.raises(TooManyBadSamples, match=r"100\.0%"):
        next(iter(open_loader(dataset_path=mix)))


def test_long_documents_are_left_out_without_stopping_the_run(
    open_loader, tmp_path, text_sample, write_lines
):
    write_lines(tmp_path / "s.jsonl", [text_sample("word " * 300)] * 50 + [text_sample("fine " * 30)] * 50)
    mix = write_lines(tmp_path / "mix.yaml", ["dataset: {s: {data_paths: [s.jsonl]}}"])
    loader = open_loader(dataset_path=mix)
    assert len(list(islice(loader, 100))) == 100
    assert loader.counts()["skipped/too_long"] > 100


def test_several_ranks_write_one_error_file_of_whole_lines(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    from vita_audio.data.report import ErrorFile

    errors = [{"reason": "bad_json", "message": "é" * 2000, "row": row} for row in range(40)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: [ErrorFile(tmp_path).write([error]) for error in errors], range(8)))
    lines = (tmp_path / "data_errors.jsonl").read_text(encoding="utf-8").splitlines()
    assert Counter(json.loads(line)["row"] for line in lines) == dict.fromkeys(range(40), 8)


def test_an_error_file_that_cannot_be_written_does_not_stop_the_run(tmp_path, caplog):
    from vita_audio.data.report import ErrorFile

    (tmp_path / "file").write_text("in the way")
    ErrorFile(tmp_path / "file" / "folder").write([{"reason": "bad_json"}])
    assert "cannot be written" in caplog.text
    assert "bad_json" in caplog.text


def test_a_codec_of_the_other_family_is_refused_at_once(open_loader):
    with pytest.raises(ValueError, match="extended for continuous input"):
        open_loader(codec=CodecSpec("sensevoice_glm4voice"))


def test_the_stream_follows_the_mix(open_loader, mix_file, arrow_cache, names):
    """What the loader reads first is what the mix has first."""
    mix = Mix(read_mix(mix_file), 42, cache_dir=arrow_cache)
    loader = open_loader()
    emitted = [name for batch in islice(loader, 10) for name in names(batch)]
    places = [mix.place(position) for position in range(len(mix))]
    order = [f"{mix.specs[place.source].path.stem}{place.row}" for place in places]
    assert set(emitted) <= set(order[: loader.report.used.total()])
