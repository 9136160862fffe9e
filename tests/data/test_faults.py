"""Audio and samples of every bad kind: nothing crashes, everything is accounted for, nothing good is lost."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile

from vita_audio.audio.mel_vq import MelVQConfig, MelVQTokenizer
from vita_audio.data import CodecSpec, DataConfig, build_train_loader


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    """A folder with one clip in many formats, and a codec in ``codec``."""
    folder = tmp_path_factory.mktemp("speech")
    time = np.arange(16_000) / 16_000
    tone = 0.3 * np.sin(2 * np.pi * 220 * time * (1 + time)) + 0.02 * np.random.default_rng(
        0
    ).standard_normal(16_000)
    soundfile.write(folder / "clip.wav", tone, 16_000)
    MelVQTokenizer.fit(
        [(_tensor(tone * level), 16_000) for level in (1, 0.5, 0.3, 0.2)],
        MelVQConfig(codebook_size=16),
        epochs=1,
    ).save_pretrained(folder / "codec")

    soundfile.write(folder / "8bit.wav", tone, 16_000, subtype="PCM_U8")
    soundfile.write(folder / "float.wav", tone, 16_000, subtype="FLOAT")
    soundfile.write(folder / "96khz.wav", np.repeat(tone, 6), 96_000)
    soundfile.write(folder / "six_channels.wav", np.stack([tone] * 6, axis=1), 16_000)
    soundfile.write(folder / "good.flac", tone, 16_000)
    soundfile.write(folder / "good.ogg", tone, 16_000)
    soundfile.write(folder / "good.mp3", tone, 16_000)
    soundfile.write(folder / "good.opus", tone, 16_000, format="OGG", subtype="OPUS")

    (folder / "zero_bytes.wav").write_bytes(b"")
    soundfile.write(folder / "no_samples.wav", np.zeros(0), 16_000)
    soundfile.write(folder / "nan.wav", np.where(time > 0.5, np.nan, tone), 16_000, subtype="FLOAT")
    (folder / "text.wav").write_text("this is not audio\n" * 50)
    for name in ("clip.wav", "good.flac"):
        content = (folder / name).read_bytes()
        (folder / f"cut_{name}").write_bytes(content[: len(content) // 3])
    (folder / "folder.wav").mkdir()
    return folder


def _tensor(wave: np.ndarray):
    import torch

    return torch.from_numpy(wave).float()


GOOD = [
    "8bit.wav",
    "float.wav",
    "96khz.wav",
    "six_channels.wav",
    "good.flac",
    "good.ogg",
    "good.mp3",
    "good.opus",
]
BAD = {
    "zero_bytes.wav",
    "no_samples.wav",
    "nan.wav",
    "text.wav",
    "cut_clip.wav",
    "cut_good.flac",
    "folder.wav",
    "absent.wav",
}


def spoken(audio: object, name: str) -> dict:
    return {
        "messages": [
            {"role": "user", "content": f"{name}.<|audio|>"},
            {"role": "assistant", "content": f"Yes, {name}.\n<|audio|>"},
        ],
        "audios": [audio, audio],
    }


@pytest.fixture
def one_epoch(speech, tmp_path, write_lines, goldens, arrow_cache):
    """Feeds lines to a loader for an epoch; returns it and the names of the samples that came out."""

    def one_epoch(lines: list, epochs: float = 1.5) -> tuple:
        data = tmp_path / "data.jsonl"
        data.write_bytes(
            b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
        )
        mix = write_lines(tmp_path / "mix.yaml", [f"dataset: {{s: {{data_paths: [{data}]}}}}"])
        config = DataConfig(
            mix,
            seq_length=256,
            num_workers=0,
            max_error_share=1,
            data_root=speech,
            arrow_cache=arrow_cache,
            open_rows=2,
        )
        loader = build_train_loader(
            config,
            goldens.tokenizer("glm4voice"),
            CodecSpec("mel_vq", str(speech / "codec")),
            output_dir=tmp_path,
        )
        names, stream = set(), iter(loader)
        while loader.counts()["epoch"] < epochs:  # what is open at the epoch's end comes out after it
            text = goldens.tokenizer("glm4voice").decode(next(stream)["input_ids"].flatten())
            names |= {part.split(".")[0] for part in text.split("<|im_start|>user\n")[1:]}
        return loader, names

    return one_epoch


def test_every_readable_format_is_used_and_every_unreadable_file_has_its_reason(one_epoch, tmp_path):
    named = {name.replace(".", "_"): name for name in [*GOOD, *BAD]}
    _, seen = one_epoch([spoken(audio, name) for name, audio in named.items()], epochs=6)
    assert seen == {name.replace(".", "_") for name in GOOD}
    errors = [json.loads(line) for line in (tmp_path / "data_errors.jsonl").read_text().splitlines()]
    reasons = {error["row"]: error["reason"] for error in errors}
    by_file = dict(zip(list(named.values()), (reasons.get(row) for row in range(len(named))), strict=True))
    assert {name for name, reason in by_file.items() if reason} == BAD
    assert by_file["absent.wav"] == "audio_missing"
    assert by_file["nan.wav"] == "audio_nan"
    assert by_file["cut_clip.wav"] == "audio_truncated"
    assert all(str(tmp_path) in error["file"] and error["message"] for error in errors)


def damaged(rng: random.Random, line: bytes, speech, index: int) -> bytes:
    """A sample damaged in one of many ways."""
    sample = json.loads(line)
    way = rng.randrange(7)
    if way == 0:  # bytes flipped in the line
        spoiled = bytearray(line)
        for _ in range(rng.randint(1, 20)):
            spoiled[rng.randrange(len(spoiled))] = rng.randrange(256)
        return bytes(spoiled).replace(b"\n", b" ").replace(b"\r", b" ")
    if way == 1:  # cut off
        return line[: rng.randrange(1, len(line))]
    if way in (2, 3):  # audio with flipped bytes, or cut off
        source = speech / rng.choice(["clip.wav", "good.flac", "good.ogg", "good.mp3"])
        content = bytearray(source.read_bytes())
        if way == 2:
            for _ in range(rng.randint(1, 200)):
                content[rng.randrange(len(content))] = rng.randrange(256)
        else:
            content = content[: rng.randrange(len(content))]
        target = f"fuzz_{index}{source.suffix}"
        (speech / target).write_bytes(content)
        sample["audios"] = [target, target]
        return json.dumps(sample).encode()
    odd = rng.choice(
        [None, 5, -1.5, float("nan"), [], {}, "", "x" * 100_000, [[]], {"a": 1}, True, "\ud800", "\0", [None]]
    )
    if way == 4:
        sample[rng.choice(["messages", "audios", "conversations"])] = odd
    elif way == 5:
        rng.choice(sample["messages"])[rng.choice(["role", "content"])] = odd
    else:
        return json.dumps(odd).encode()
    return json.dumps(sample).encode()


def test_five_hundred_damaged_samples_crash_nothing_and_lose_no_good_sample(one_epoch, speech):
    rng = random.Random(7)
    good = [json.dumps(spoken(rng.choice(GOOD), f"good{index}")).encode() for index in range(100)]
    bad = [
        damaged(rng, json.dumps(spoken("clip.wav", "spoiled")).encode(), speech, index)
        for index in range(500)
    ]
    lines = [*good, *bad]
    rng.shuffle(lines)
    lines = [line for line in lines if line.strip()]
    loader, seen = one_epoch(lines)
    assert {f"good{index}" for index in range(100)} <= seen
    report = loader.report
    read = report.position + 1
    assert report.seen == read, "a sample vanished without a count"
    assert report.used.total() + report.skipped.total() == read
    assert report.bad > 200
    assert not any(reason == "internal" for _, reason in report.skipped), report.summary()


def test_m4a_is_read_with_ffmpeg_and_refused_without(one_epoch, speech):
    shutil.copy(Path(__file__).with_name("tone.m4a"), speech / "clip.m4a")
    loader, seen = one_epoch([spoken("clip.m4a", "m4a"), spoken("clip.wav", "wav")])
    if shutil.which("ffmpeg"):
        assert seen == {"m4a", "wav"}
    else:
        assert seen == {"wav"}
        assert {reason for _, reason in loader.report.skipped} == {"audio_unreadable"}
