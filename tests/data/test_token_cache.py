"""Codes ahead of time: the command that makes them, the cache that finds them, and what happens without."""

from __future__ import annotations

import errno
import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from vita_audio.audio import AudioError
from vita_audio.audio.mel_vq import MelVQConfig, MelVQTokenizer
from vita_audio.cli import tokenize_audio
from vita_audio.data import CodecSpec, DataConfig, build_train_loader
from vita_audio.data.speech import SpeechReader
from vita_audio.data.token_cache import (
    CachedClip,
    CodecIdentity,
    TokenCache,
    TokenCacheError,
    path_hash,
    write_identity,
    write_shard,
)
from vita_audio.files import whole_file

CLIPS = 14


@pytest.fixture
def corpus(tmp_path, write_lines, monkeypatch, arrow_cache):
    """Spoken questions and answers (tones), one clip that is not audio, and a codec for them."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", Path(arrow_cache))
    generator = np.random.default_rng(0)
    samples = []
    for index in range(CLIPS):
        name = f"audio/{index}.wav"
        seconds = 0.4 + 0.1 * (index % 5)
        time = np.arange(int(16_000 * seconds)) / 16_000
        wave = np.sin(2 * np.pi * (200 + 60 * index) * time) * 0.3 + 0.05 * generator.standard_normal(
            len(time)
        )
        (tmp_path / "audio").mkdir(exist_ok=True)
        soundfile.write(tmp_path / name, wave, 16_000)
        question = index % 2 == 0
        messages = [
            {"role": "user", "content": "<|audio|>" if question else "Convert the text to speech.\nhey"},
            {"role": "assistant", "content": "hello" if question else "<|audio|>"},
        ]
        samples.append({"messages": messages, "audios": [name]})
    (tmp_path / "audio" / "noise.wav").write_bytes(b"not audio at all")
    samples.append({"messages": messages, "audios": ["audio/noise.wav"]})
    write_lines(tmp_path / "data.jsonl", samples)
    write_lines(tmp_path / "mix.yaml", ["dataset: {speech: {data_paths: [data.jsonl]}}"])
    codec = MelVQTokenizer.fit(
        [str(tmp_path / f"audio/{index}.wav") for index in range(CLIPS)],
        MelVQConfig(codebook_size=32),
        epochs=2,
    )
    codec.save_pretrained(tmp_path / "codec")
    return tmp_path


@pytest.fixture
def run_tool(corpus):
    def run(rank: int = 0, world_size: int = 1, kind: str = "mel_vq", **options):
        arguments = ["--dataset_name", corpus / "mix.yaml", "--audio_tokenizer_type", kind]
        arguments += ["--audio_tokenizer_path", corpus / "codec", "--output_dir", corpus / "tokens"]
        for name, value in options.items():
            arguments += [f"--{name}", value]
        parsed = tokenize_audio.parse_options([str(argument) for argument in arguments])
        return tokenize_audio.tokenize(tokenize_audio.read_mix(parsed.dataset_name), parsed, rank, world_size)

    return run


def open_cache(corpus: Path, arrow_cache: str) -> TokenCache:
    return TokenCache.find(corpus / "tokens", "mel_vq", arrow_cache=arrow_cache)


def test_ranks_split_the_work_and_the_cache_holds_the_codecs_codes(corpus, run_tool, arrow_cache):
    summaries = [run_tool(rank, 3, shard_clips=4, batch_seconds=1.5) for rank in range(3)]
    assert sum(summary.clips for summary in summaries) == CLIPS
    assert sum(summary.failures.total() for summary in summaries) == 1
    assert sum(summary.seconds for summary in summaries) == pytest.approx(
        sum(soundfile.info(corpus / f"audio/{index}.wav").duration for index in range(CLIPS))
    )
    codec = MelVQTokenizer.from_pretrained(corpus / "codec")
    cache = open_cache(corpus, arrow_cache)
    assert len(cache) == CLIPS
    for index in range(CLIPS):
        assert cache.find_clip(f"audio/{index}.wav").codes == codec.encode(str(corpus / f"audio/{index}.wav"))
    assert cache.find_clip("audio/absent.wav") is None
    failures = [json.loads(line) for file in corpus.glob("tokens/*/failures-*") for line in file.open()]
    assert [Path(failure["path"]).name for failure in failures] == ["noise.wav"]


def test_a_second_run_encodes_only_missing_changed_or_damaged_clips(corpus, run_tool, arrow_cache):
    run_tool(shard_clips=5)
    assert run_tool().clips == 0
    shards = sorted(corpus.glob("tokens/*/tokens-*.parquet"))
    shards[0].unlink()
    shards[1].write_bytes(shards[1].read_bytes()[:100])
    wave, rate = soundfile.read(corpus / "audio/3.wav")
    soundfile.write(corpus / "audio/3.wav", wave[: len(wave) // 2], rate)
    again = run_tool()
    assert again.clips in (10, 11)  # the changed clip may have been in a lost shard
    cache, codec = open_cache(corpus, arrow_cache), MelVQTokenizer.from_pretrained(corpus / "codec")
    for index in range(CLIPS):
        assert cache.find_clip(f"audio/{index}.wav").codes == codec.encode(str(corpus / f"audio/{index}.wav"))


def test_of_continuous_kinds_only_the_assistants_speech_is_encoded(corpus, run_tool, arrow_cache):
    assert run_tool(kind="sensevoice_mel_vq").clips == CLIPS // 2
    assert (
        TokenCache.find(corpus / "tokens", "sensevoice_mel_vq", arrow_cache=arrow_cache).identity.kind
        == "mel_vq"
    )


def test_a_failing_batch_loses_only_its_faulty_clip(corpus, run_tool, monkeypatch):
    encode = MelVQTokenizer.encode

    def fragile(self, audio):
        if audio.endswith("/5.wav"):
            raise RuntimeError("out of memory")
        return encode(self, audio)

    monkeypatch.setattr(MelVQTokenizer, "encode", fragile)
    summary = run_tool()
    assert summary.clips == CLIPS - 1
    assert summary.failures == {"internal": 1, "unreadable": 1}


@pytest.fixture
def open_loader(corpus, goldens, arrow_cache):
    def open_loader(**options):
        return build_train_loader(
            DataConfig(
                corpus / "mix.yaml",
                seq_length=128,
                arrow_cache=arrow_cache,
                max_error_share=0.5,
                open_rows=2,
                **options,
            ),
            goldens.tokenizer("glm4voice"),
            CodecSpec("mel_vq", str(corpus / "codec")),
        )

    return open_loader


@pytest.mark.parametrize("num_workers", [0, 1])
def test_rows_from_cached_codes_equal_rows_encoded_on_the_fly(
    corpus, run_tool, open_loader, row_hash, num_workers
):
    on_the_fly = open_loader(num_workers=num_workers)
    expected = [row_hash(batch) for batch in islice(on_the_fly, 12)]
    assert on_the_fly.counts()["speech/codec"] > 20
    run_tool()
    for index in range(CLIPS):
        (corpus / f"audio/{index}.wav").unlink()  # codes suffice
    cached = open_loader(num_workers=num_workers, token_cache=corpus / "tokens")
    assert [row_hash(batch) for batch in islice(cached, 12)] == expected
    assert cached.counts()["speech/cache"] == on_the_fly.counts()["speech/codec"]


def test_a_clip_that_changed_since_is_encoded_again(corpus, run_tool, open_loader):
    run_tool()
    wave, rate = soundfile.read(corpus / "audio/3.wav")
    soundfile.write(corpus / "audio/3.wav", wave[: len(wave) // 2], rate)
    loader = open_loader(num_workers=0, token_cache=corpus / "tokens")
    list(islice(loader, 20))
    counts = loader.counts()
    assert counts["speech/stale"] > 0
    assert counts["speech/cache"] > counts["speech/stale"]


def test_only_codes_of_the_same_codec_are_used(corpus, run_tool, open_loader):
    other = CodecIdentity("mel_vq", "another", 32)
    write_identity(corpus / "tokens" / other.folder_name, other)
    with pytest.raises(TokenCacheError, match=r"no codes of kind 'mel_vq' and fingerprint .*mel_vq-another"):
        open_loader(num_workers=0, token_cache=corpus / "tokens")
    run_tool()
    loader = open_loader(num_workers=0, token_cache=corpus / "tokens")
    list(islice(loader, 5))
    assert loader.counts()["speech/cache"] > 0


def test_a_cache_that_is_missing_or_ambiguous_is_named(tmp_path, arrow_cache):
    with pytest.raises(TokenCacheError, match="it holds nothing"):
        TokenCache.find(tmp_path, "mel_vq")
    for fingerprint in ("one", "two"):
        identity = CodecIdentity("mel_vq", fingerprint, 32)
        write_identity(tmp_path / identity.folder_name, identity)
    with pytest.raises(TokenCacheError, match="several codecs of kind 'mel_vq'"):
        TokenCache.find(tmp_path, "mel_vq")
    with pytest.raises(TokenCacheError, match="no codes of kind 'glm4voice'"):
        TokenCache.find(tmp_path, "glm4voice")
    assert len(TokenCache.find(tmp_path, "mel_vq", "two", arrow_cache)) == 0
    assert len(TokenCache.find(tmp_path / "mel_vq-one", "mel_vq", arrow_cache=arrow_cache)) == 0


def test_a_damaged_codec_file_is_named(tmp_path):
    (tmp_path / "mel_vq-one").mkdir()
    (tmp_path / "mel_vq-one" / "codec.json").write_text('{"kind": "mel_vq"')
    with pytest.raises(TokenCacheError, match=r"mel_vq-one/codec\.json: does not name a codec"):
        TokenCache.find(tmp_path, "mel_vq")


@pytest.mark.parametrize("world_size", [2, 8])
def test_numbered_files_are_shared_evenly(world_size):
    names = [f"LibriSpeech/84/121123/84-121123-{number:04d}.flac" for number in range(1000)]
    shares = np.bincount([int(path_hash(name)) % world_size for name in names], minlength=world_size)
    assert shares.min() > 0.7 * 1000 / world_size


def test_a_shard_is_whole_or_absent(tmp_path, monkeypatch):
    def torn(self, path, *_, **__):
        Path(path).write_bytes(b"half of a")
        raise KeyboardInterrupt

    monkeypatch.setattr("datasets.Dataset.to_parquet", torn)
    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path, "x", [])
    assert not list(tmp_path.glob("tokens-*.parquet"))


class CountingCodec:
    kind = "glm4voice"

    def __init__(self, codes) -> None:
        self.codes, self.calls = codes, 0

    def encode(self, audio):
        self.calls += 1
        if self.codes is None:
            raise AudioError(f"{audio}: gone", "missing")
        return self.codes

    def features(self, audio):
        return torch.zeros(3, 560)


def test_public_token_files_are_used_if_valid_and_ignored_otherwise(goldens, tmp_path):
    for case in goldens.lines("preprocess/token_cache.jsonl"):
        if case.get("raises"):
            continue
        folder = tmp_path / case["audio_tokenizer_type"] / case["name"]
        token_file, before = folder / case["cache_path"], case["cache_content_before"]
        if before is not None:
            token_file.parent.mkdir(parents=True)
            token_file.write_text(before if isinstance(before, str) else json.dumps(before))
        codec = CountingCodec(case["encoder_would_return"])
        codec.kind = case["audio_tokenizer_type"]
        reader = SpeechReader(codec)
        # Defect 21 of the public code: it believes any content of the file.
        sound = isinstance(before, list) and bool(before)
        assert reader.encode(str(folder / case["audio_path"])) == (before if sound else codec.codes), case[
            "name"
        ]
        assert codec.calls == (0 if sound else 1), case["name"]
        assert token_file.exists() == (before is not None), "reading must not write"


def test_clips_too_long_for_any_row_are_refused_unread(tmp_path):
    from vita_audio.data import SampleError

    soundfile.write(tmp_path / "long.wav", np.zeros(16_000 * 5), 16_000)
    codec = CountingCodec([1])
    with pytest.raises(SampleError, match="5 s, the limit is 4 s"):
        SpeechReader(codec, max_seconds=4).encode(str(tmp_path / "long.wav"))
    assert codec.calls == 0


@pytest.fixture
def small_cache(tmp_path):
    identity = CodecIdentity("mel_vq", "one", 8)
    folder = tmp_path / identity.folder_name
    write_identity(folder, identity)
    write_shard(folder, "x", [CachedClip(f"{index}.wav", "0", 1, 1.0, [index]) for index in range(8)])
    return folder


def test_the_index_of_a_read_only_cache_is_stored_elsewhere(tmp_path, small_cache, monkeypatch, arrow_cache):
    def refuse(path):
        if path.parent == small_cache:
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return whole_file(path)

    monkeypatch.setattr("vita_audio.data.token_cache.whole_file", refuse)
    for _ in range(2):
        cache = TokenCache.find(tmp_path, "mel_vq", arrow_cache=arrow_cache)
        assert cache.find_clip("5.wav").codes == [5]
    assert not list(small_cache.glob("index-*"))


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY", b"torn"])
def test_a_damaged_index_is_built_again(tmp_path, small_cache, arrow_cache, damage):
    TokenCache.find(tmp_path, "mel_vq", arrow_cache=arrow_cache)
    [index] = small_cache.glob("index-*.npy")
    whole = index.read_bytes()
    for content in (damage, whole[:-8]):
        index.write_bytes(content)
        assert TokenCache.find(tmp_path, "mel_vq", arrow_cache=arrow_cache).find_clip("5.wav").codes == [5]
        assert index.read_bytes() == whole
