"""Clips in tar archives and Parquet files give the rows of single files, and take codes from the cache first."""

from __future__ import annotations

import tarfile
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import soundfile

from vita_audio.audio.mel_vq import MelVQConfig, MelVQTokenizer
from vita_audio.cli.tokenize_audio import main
from vita_audio.data import CodecSpec, DataConfig, build_train_loader

CLIPS = 12
ARCHIVES = {"tars": "clips.tar", "rows": "clips.parquet"}


def pack(archive: Path, clips: list[Path]) -> None:
    """The clips as members ``a/0.flac``, or as rows of the column ``audio``, five to a row group."""
    if archive.suffix == ".tar":
        with tarfile.open(archive, "w") as tar:
            for index, clip in enumerate(clips):
                tar.add(clip, f"a/{index}.flac")
        return
    rows = [{"audio": {"bytes": clip.read_bytes(), "path": clip.name}, "text": "Yes."} for clip in clips]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), archive, row_group_size=5)


@pytest.fixture(scope="module")
def world(tmp_path_factory, write_lines) -> Path:
    """Three data roots with the same clips: ``files`` with a folder, ``tars`` and ``rows`` with an archive."""
    folder = tmp_path_factory.mktemp("world")
    generator = np.random.default_rng(0)
    (folder / "files/clips").mkdir(parents=True)
    for index in range(CLIPS):
        noise = 0.1 * generator.standard_normal(4000 + 500 * index)
        soundfile.write(folder / f"files/clips/{index}.flac", noise, 16_000)
    for place, archive in ARCHIVES.items():
        (folder / place).mkdir()
        pack(folder / place / archive, clips_of(folder))
    paths = [str(path) for path in sorted((folder / "files/clips").iterdir())]
    MelVQTokenizer.fit(paths, MelVQConfig(codebook_size=8), epochs=1).save_pretrained(folder / "codec")
    names = {"files": "clips/{}.flac", "tars": "clips.tar/a/{}.flac", "rows": "clips.parquet/audio/{}"}
    for place, name in names.items():
        turns = [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "Yes.\n<|audio|>"}]
        lines = [{"messages": turns, "audios": [name.format(index)]} for index in range(CLIPS)]
        write_lines(folder / place / "data.jsonl", lines)
        write_lines(folder / place / "mix.yaml", ["dataset: {said: {data_paths: [data.jsonl]}}"])
    return folder


def clips_of(world: Path) -> list[Path]:
    return [world / f"files/clips/{index}.flac" for index in range(CLIPS)]


def rows(world, goldens, row_hash, arrow_cache, place: str, **options) -> tuple[list[str], dict[str, float]]:
    loader = build_train_loader(
        DataConfig(
            world / place / "mix.yaml", seq_length=128, num_workers=0, arrow_cache=arrow_cache, **options
        ),
        goldens.tokenizer("glm4voice"),
        CodecSpec("mel_vq", str(world / "codec")),
    )
    return [row_hash(batch) for batch in islice(loader, 8)], loader.counts()


@pytest.mark.parametrize("place", ARCHIVES)
def test_clips_in_an_archive_give_the_rows_of_single_files(world, goldens, row_hash, arrow_cache, place):
    from_files, _ = rows(world, goldens, row_hash, arrow_cache, "files")
    from_archive, counts = rows(world, goldens, row_hash, arrow_cache, place)
    assert from_archive == from_files
    assert counts["speech/codec"] > CLIPS
    assert counts["skipped"] == 0
    assert "speech/invalid" not in counts, "an archive has no folder in which codes could lie beside a clip"


@pytest.mark.parametrize("place", ARCHIVES)
def test_codes_of_an_archives_clips_come_from_the_cache_even_without_the_archive(
    world, goldens, row_hash, arrow_cache, tmp_path, monkeypatch, place
):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "arrow")
    expected, _ = rows(world, goldens, row_hash, arrow_cache, place)
    flags = [
        "--dataset_name",
        world / place / "mix.yaml",
        "--output_dir",
        tmp_path / "tokens",
        "--device",
        "cpu",
    ]
    flags += ["--audio_tokenizer_type", "mel_vq", "--audio_tokenizer_path", world / "codec"]
    main([str(flag) for flag in flags])
    cached, counts = rows(world, goldens, row_hash, arrow_cache, place, token_cache=tmp_path / "tokens")
    assert cached == expected
    assert (counts["speech/cache"] > CLIPS, "speech/codec" in counts) == (True, False)
    archive, cached = world / place / ARCHIVES[place], tmp_path / "tokens"
    away = archive.rename(archive.with_name("away"))
    try:
        assert rows(world, goldens, row_hash, arrow_cache, place, token_cache=cached)[0] == expected
        clips = clips_of(world)
        pack(archive, [clips[(index + 1) // 2] for index in range(CLIPS)])  # other clips under the old names
        changed, counts = rows(world, goldens, row_hash, arrow_cache, place, token_cache=cached)
        assert changed != expected
        assert counts["speech/stale"] > CLIPS, "clips of an archive whose size changed are encoded again"
    finally:
        away.rename(archive)
