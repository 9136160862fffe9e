"""Speech sets that their publishers offer as tar archives, with transcripts inside or beside them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from miniatures.files import (
    CHINESE,
    DAMAGED,
    ENGLISH,
    Expected,
    clip,
    damaged,
    table,
    tar,
    wenetspeech_part,
    write,
)


def emilia(source: Path, *, prompt: bool = False) -> Expected:
    """Two utterances of one speaker, one of another, one damaged, one without recording."""
    expected: Expected = {}
    for language, archives, texts in (("ZH", 10, CHINESE), ("EN", 12, ENGLISH)):
        for number in range(archives):
            first, last = number * 100, number * 100 + 100
            members: dict[str, bytes | str] = {}
            for index in range(5):
                name = f"{language}_B{first:05d}_S00000_W{index:06d}"
                speaker = f"{language}_B{first:05d}_S{0 if index < 2 else index:05d}"
                about = {"id": name, "wav": f"x/{name}.mp3", "text": texts[index % 3], "duration": 1.5}
                about |= {"speaker": speaker, "language": language.lower(), "dnsmos": 3.3}
                members[f"{name}.json"] = json.dumps(about)
                if index < 4:
                    members[f"{name}.mp3"] = damaged(index, "mp3") if index == 3 else clip(index, "mp3")
            tar(source / "Emilia" / language / f"{language}-B{first:06d}.tar", members)
            kind = "_speak_prompt" if prompt else ""
            output = f"datasets/jsonl/amphion/Emilia-Dataset/{language}_B{first:06d}_B{last:06d}{kind}.jsonl"
            broken = {"audio_truncated": 1, "no_audio": 1}
            expected[output] = (1, broken | {"no_prompt": 2}) if prompt else (3, broken)
    return expected


def wenetspeech(source: Path) -> Expected:
    """Cuts of lhotse with a gzipped archive beside each manifest."""
    ids = [f"X0000016296_1353439{number}_S0001{number}" for number in range(3)]
    for split in ("L", "DEV"):
        name = f"cuts_{split}_fixed.00000000"
        wenetspeech_part(
            source / "data", name, ids, [" ".join(text) for text in CHINESE], [clip(0), clip(1), damaged(2)]
        )
    folder = "datasets/jsonl/wenet-e2e/wenetspeech"
    return {f"{folder}/{split}_fixed.jsonl": (2, DAMAGED) for split in ("L", "DEV")}


def common_voice(source: Path) -> Expected:
    """One table for two archives; a clip of the second has no row."""
    for language, texts in (("en", ENGLISH), ("zh-CN", CHINESE)):
        names = [f"common_voice_{language}_{number}.mp3" for number in range(4)]
        clips = [damaged(number, "mp3") if number == 2 else clip(number, "mp3") for number in range(4)]
        for part in range(2):
            mine = range(2 * part, 2 * part + 2)
            members = {f"{language}_train_{part}/{names[number]}": clips[number] for number in mine}
            tar(source / f"audio/{language}/train/{language}_train_{part}.tar", members)
        rows = [{"client_id": "c1", "path": names[number], "sentence": texts[number]} for number in range(3)]
        write(source / f"transcript/{language}/train.tsv", table(rows, "\t"))
    folder = "datasets/jsonl/mozilla-foundation/common_voice_17_0"
    return {
        f"{folder}/{language}/train.jsonl": (2, DAMAGED | {"no_transcript": 1})
        for language in ("en", "zh-CN")
    }


def gigaspeech(source: Path) -> Expected:
    """Gzipped archives with a CSV each; one segment is missing from its archive."""
    for split in ("xl", "dev"):
        ids = [f"POD1000000004_S000000{number}" for number in range(4)]
        members = {f"{split}_chunks_0000/{id_}.wav": clip(number) for number, id_ in enumerate(ids[:2])}
        members[f"{split}_chunks_0000/{ids[2]}.wav"] = damaged(2)
        tar(source / f"data/audio/{split}_files/{split}_chunks_0000.tar.gz", members, "w:gz")
        texts = [f"{text.upper()} <PERIOD>" for text in (*ENGLISH, "SO <COMMA> IT GOES")]
        rows = [
            {
                "sid": id_,
                "speaker": "N/A",
                "begin_time": 0.0,
                "end_time": 1.5,
                "title": "a, b",
                "text_tn": text,
            }
            for id_, text in zip(ids, texts, strict=True)
        ]
        write(source / f"data/metadata/{split}_metadata/{split}_chunks_0000_metadata.csv", table(rows, ","))
    folder = "datasets/jsonl/speechcolab/gigaspeech"
    return {f"{folder}/{split}.jsonl": (2, DAMAGED | {"no_audio": 1}) for split in ("xl", "dev")}


def voxpopuli(source: Path) -> Expected:
    for config, split in (("en", "train"), ("en_accented", "test")):
        ids = [f"20180612-0900-PLENARY-3-en_2018061{number}" for number in range(3)]
        clips = {f"{split}_part_0/{id_}.wav": clip(number) for number, id_ in enumerate(ids[:2])}
        clips[f"{split}_part_0/{ids[2]}.wav"] = damaged(2)
        tar(source / f"data/{config}/{split}/{split}_part_0.tar.gz", clips, "w:gz")
        rows = [
            {
                "id": id_,
                "raw_text": text,
                "normalized_text": text,
                "speaker_id": 1,
                "split": split,
                "gender": "f",
            }
            for id_, text in zip(ids, ENGLISH, strict=True)
        ]
        write(source / f"data/{config}/asr_{split}.tsv", table(rows, "\t"))
    folder = "datasets/jsonl/facebook/voxpopuli"
    return {f"{folder}/{name}.jsonl": (2, DAMAGED) for name in ("en_train", "en_accented_test")}


ARCHIVES: dict[str, Callable[[Path], Expected]] = {
    "wenet-e2e/wenetspeech": wenetspeech,
    "mozilla-foundation/common_voice_17_0": common_voice,
    "amphion/Emilia-Dataset": emilia,
    "amphion/Emilia-Dataset/speaker_prompt": lambda source: emilia(source, prompt=True),
    "speechcolab/gigaspeech": gigaspeech,
    "facebook/voxpopuli": voxpopuli,
}
