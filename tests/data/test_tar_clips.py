"""Clips in tar archives give the same rows as single files, and take their codes from the cache first."""

from __future__ import annotations

import tarfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import soundfile

from vita_audio.audio.mel_vq import MelVQConfig, MelVQTokenizer
from vita_audio.cli.tokenize_audio import main
from vita_audio.data import CodecSpec, DataConfig, build_train_loader

CLIPS = 12


@pytest.fixture(scope="module")
def world(tmp_path_factory, write_lines) -> Path:
    """Two data roots with the same relative names: ``files`` with a folder of clips, ``tars`` with an archive."""
    folder = tmp_path_factory.mktemp("world")
    generator = np.random.default_rng(0)
    for place in ("files", "tars"):
        (folder / place).mkdir()
    (folder / "files/clips").mkdir()
    for index in range(CLIPS):
        noise = 0.1 * generator.standard_normal(4000 + 500 * index)
        soundfile.write(folder / f"files/clips/{index}.flac", noise, 16_000)
    with tarfile.open(folder / "tars/clips.tar", "w") as tar:
        tar.add(folder / "files/clips", "a")
    paths = [str(path) for path in sorted((folder / "files/clips").iterdir())]
    MelVQTokenizer.fit(paths, MelVQConfig(codebook_size=8), epochs=1).save_pretrained(folder / "codec")
    for place, name in (("files", "clips/{}.flac"), ("tars", "clips.tar/a/{}.flac")):
        turns = [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "Yes.\n<|audio|>"}]
        lines = [{"messages": turns, "audios": [name.format(index)]} for index in range(CLIPS)]
        write_lines(folder / place / "data.jsonl", lines)
        write_lines(folder / place / "mix.yaml", ["dataset: {said: {data_paths: [data.jsonl]}}"])
    return folder


def rows(world, goldens, row_hash, arrow_cache, place: str, **options) -> tuple[list[str], dict[str, float]]:
    loader = build_train_loader(
        DataConfig(
            world / place / "mix.yaml", seq_length=128, num_workers=0, arrow_cache=arrow_cache, **options
        ),
        goldens.tokenizer("glm4voice"),
        CodecSpec("mel_vq", str(world / "codec")),
    )
    return [row_hash(batch) for batch in islice(loader, 8)], loader.counts()


def test_clips_in_an_archive_give_the_rows_of_single_files(world, goldens, row_hash, arrow_cache):
    from_files, _ = rows(world, goldens, row_hash, arrow_cache, "files")
    from_tars, counts = rows(world, goldens, row_hash, arrow_cache, "tars")
    assert from_tars == from_files
    assert counts["speech/codec"] > CLIPS
    assert counts["skipped"] == 0


def test_codes_of_an_archives_clips_come_from_the_cache_even_without_the_archive(
    world, goldens, row_hash, arrow_cache, tmp_path, monkeypatch
):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "arrow")
    expected, _ = rows(world, goldens, row_hash, arrow_cache, "tars")
    flags = [
        "--dataset_name",
        world / "tars/mix.yaml",
        "--output_dir",
        tmp_path / "tokens",
        "--device",
        "cpu",
    ]
    flags += ["--audio_tokenizer_type", "mel_vq", "--audio_tokenizer_path", world / "codec"]
    main([str(flag) for flag in flags])
    cached, counts = rows(world, goldens, row_hash, arrow_cache, "tars", token_cache=tmp_path / "tokens")
    assert cached == expected
    assert (counts["speech/cache"] > CLIPS, "speech/codec" in counts) == (True, False)
    archive, cached = world / "tars/clips.tar", tmp_path / "tokens"
    archive.rename(world / "tars/away.tar")
    try:
        assert rows(world, goldens, row_hash, arrow_cache, "tars", token_cache=cached)[0] == expected
        with tarfile.open(archive, "w") as tar:  # other clips under the old names
            for index in range(CLIPS):
                tar.add(world / f"files/clips/{(index + 1) // 2}.flac", f"a/{index}.flac")
        changed, counts = rows(world, goldens, row_hash, arrow_cache, "tars", token_cache=cached)
        assert changed != expected
        assert counts["speech/stale"] > CLIPS, "clips of an archive whose size changed are encoded again"
    finally:
        (world / "tars/away.tar").rename(archive)
