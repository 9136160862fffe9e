"""Speech sets that their publishers offer as Parquet files with an audio column."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from miniatures.files import DAMAGED, ENGLISH, Expected, clip, damaged, parquet


def audio_rows(columns: dict[str, str], texts: list[str], kind: str = "flac", **more: object) -> list[dict]:
    """Rows of a Parquet file; the clip of the last one is damaged."""
    rows = []
    for number, text in enumerate(texts):
        content = damaged(number, kind) if number == len(texts) - 1 else clip(number, kind)
        row = {columns["audio"]: {"bytes": content, "path": f"{number}.{kind}"}, columns["text"]: text}
        row |= {columns[key]: f"{key}-{number // 2}-{number}" for key in ("id",) if key in columns}
        row |= {columns["speaker"]: number // 2} if "speaker" in columns else {}
        rows.append(row | more)
    return rows


def parquet_set(
    folder: str, outputs: dict[str, str], columns: dict[str, str], kind: str = "flac", **more: object
):
    """A maker of a set in Parquet: three rows per file, the last with a damaged clip."""

    def make(source: Path) -> Expected:
        for file in outputs.values():
            parquet(source / file, audio_rows(columns, ENGLISH, kind, **more))
        return {f"datasets/jsonl/{folder}/{name}": (2, DAMAGED) for name in outputs}

    return make


PARQUET_SETS: dict[str, Callable[[Path], Expected]] = {
    "fixie-ai/librispeech_asr": parquet_set(
        "fixie-ai/librispeech_asr",
        {
            "train.100.clean.jsonl": "clean/train.100-00000-of-00014.parquet",
            "train.360.clean.jsonl": "clean/train.360-00000-of-00048.parquet",
            "train.500.other.jsonl": "other/train.500/0000.parquet",
        },
        {"audio": "audio", "text": "text", "id": "id", "speaker": "speaker_id"},
        file="/x.flac",
        chapter_id=7,
    ),
    "mythicinfinity/libritts": parquet_set(
        "mythicinfinity",
        {
            f"{name}/{split}.jsonl": f"{name}/data/{split}/{split}_00000-of-00010.parquet"
            for name in ("libritts", "libritts_r")
            for split in ("train.clean.100", "train.clean.360", "train.other.500")
        },
        {"audio": "audio", "text": "text_normalized", "id": "id", "speaker": "speaker_id"},
        "wav",
        text_original="x",
        path="/x.wav",
    ),
    "parler-tts/mls_eng": parquet_set(
        "parler-tts/mls_eng",
        {"train.jsonl": "data/train-00000-of-04269.parquet"},
        {"audio": "audio", "text": "transcript", "speaker": "speaker_id"},
        original_path="http://x",
        begin_time=0.0,
    ),
    "MushanW/GLOBE_V2": parquet_set(
        "MushanW/GLOBE_V2",
        {"train.jsonl": "data/train-00000-of-00123.parquet"},
        {"audio": "audio", "text": "transcript", "speaker": "speaker_id"},
        accent="England English",
        duration=1.5,
    ),
    "MLCommons/peoples_speech": parquet_set(
        "MLCommons/peoples_speech",
        {
            **{
                f"{part}.jsonl": f"{part}/train-00000-of-00804.parquet"
                for part in ("clean", "clean_sa", "dirty", "dirty_sa")
            },
            "validation.jsonl": "validation/validation-00000-of-00005.parquet",
        },
        {"audio": "audio", "text": "text", "id": "id"},
        duration_ms=1500,
    ),
}
