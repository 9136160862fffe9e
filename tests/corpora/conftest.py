"""Miniatures of the publishers' releases: the real folders, names and columns, with a few short clips.

Each maker returns what its set must give: samples and rejections by output. One clip of most sets is damaged.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import tarfile
import zipfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import soundfile

Expected = dict[str, tuple[int, dict[str, int]]]
ENGLISH = [
    "the quiet river runs past the mill",
    "a small boat waits at the bridge",
    "every lamp in town was lit",
]
CHINESE = ["今天天气很好我们出去走走", "他在北京的一家书店里工作", "请把窗户打开让空气进来"]
DAMAGED = {"audio_truncated": 1}


@lru_cache
def waveform(seed: int, seconds: float = 1.5, rate: int = 16_000) -> np.ndarray:
    """A warble in noise, different for every seed."""
    generator = np.random.default_rng(seed)
    time = np.arange(int(rate * seconds)) / rate
    pitch = 200 + 20 * (seed % 9) + 60 * np.sin(2 * math.pi * (2 + seed % 3) * time)
    tone = 0.3 * np.sin(2 * math.pi * np.cumsum(pitch) / rate)
    return (tone + 0.02 * generator.standard_normal(len(time))).astype(np.float32)


@lru_cache
def clip(seed: int, kind: str = "wav", seconds: float = 1.5) -> bytes:
    """Content of an audio file."""
    content, samples = io.BytesIO(), (32767 * waveform(seed, seconds)).astype(np.int16)
    soundfile.write(content, samples, 16_000, format=kind)
    return content.getvalue()


def damaged(seed: int, kind: str = "wav") -> bytes:
    content = clip(seed, kind)
    return content[: len(content) // 2]


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def lines(*values: object) -> str:
    return "".join(
        f"{value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}\n" for value in values
    )


def parquet(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def tar(path: Path, members: dict[str, bytes | str], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            content = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def table(rows: list[dict], delimiter: str) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


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
    from lhotse import MonoCut, Recording, SupervisionSegment
    from lhotse.audio import AudioSource

    for split in ("L", "DEV"):
        name = f"cuts_{split}_fixed.00000000"
        cuts, members = [], {}
        for number, text in enumerate(CHINESE):
            id_ = f"X0000016296_1353439{number}_S0001{number}"
            path = f"{name}/X00/{id_}.wav"
            sources = [AudioSource("file", [0], f"data/{path}")]
            recording = Recording(id_, sources, 16_000, 24_000, 1.5)
            said = SupervisionSegment(id_, id_, 0, 1.5, text=" ".join(text), language="Chinese")
            cuts.append(MonoCut(id_, 0, 1.5, 0, [said], recording=recording))
            members[path] = damaged(number) if number == 2 else clip(number)
        tar(source / "data" / f"{name}.tar.gz", members, "w:gz")
        write(
            source / "data" / f"{name}.jsonl.gz",
            gzip.compress(lines(*(cut.to_dict() for cut in cuts)).encode()),
        )
    folder = "datasets/jsonl/wenet-e2e/wenetspeech"
    return {f"{folder}/{split}_fixed.jsonl": (2, DAMAGED) for split in ("L", "DEV")}


def wenetspeech4tts(source: Path) -> Expected:
    """A list of files; one is damaged, and one is not there, which lhotse logs."""
    folder = "Premium/WenetSpeech4TTS_Premium_9"
    names = [f"X0000001735_5063969{number}_S00035" for number in range(4)]
    for number, name in enumerate(names[:3]):
        write(source / folder / "wavs" / f"{name}.wav", damaged(number) if number == 2 else clip(number))
        write(source / folder / "txts" / f"{name}.txt", f"{name}\t{CHINESE[number]}\n[0.0, 1.5]\n")
    write(
        source / "filelists/Basic_filelist.lst",
        lines(*(f"{name} ../{folder}/wavs/{name}.wav" for name in names)),
    )
    for part in ("Basic", "Standard", "Premium"):
        write(source / f"DNSMOS_P808Scores/{part}_DNSMOS.lst", lines(*(f"{name} 3.9" for name in names)))
    return {"datasets/jsonl/Wenetspeech4TTS/WenetSpeech4TTS/Basic.jsonl": (2, DAMAGED | {"no_audio": 1})}


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


def magicdata(source: Path) -> Expected:
    for split in ("train", "dev", "test"):
        names = [f"14_3466_2017082617115{number}.wav" for number in range(3)]
        for number, name in enumerate(names):
            write(source / f"SLR68/{split}/14_3466/{name}", damaged(number) if number == 2 else clip(number))
        rows = [f"{name}\t14_3466\t{text}" for name, text in zip(names, CHINESE, strict=True)]
        write(source / f"SLR68/{split}/TRANS.txt", lines("UtteranceID\tSpeakerID\tTranscription", *rows))
    return {f"datasets/jsonl/openslr/SLR68/{split}.jsonl": (2, DAMAGED) for split in ("train", "dev")}


def aishell(source: Path) -> Expected:
    for split in ("train", "dev", "test"):
        for number in range(4):  # the last has no transcript
            name = f"BAC009S0002W012{number}.wav"
            content = damaged(number) if number == 2 else clip(number)
            write(source / f"AISHELL-1/data_aishell/wav/{split}/S0002/{name}", content)
    texts = [f"BAC009S0002W012{number} {' '.join(text)}" for number, text in enumerate(CHINESE)]
    write(source / "AISHELL-1/data_aishell/transcript/aishell_transcript_v0.8.txt", lines(*texts))

    for split in ("data", "dev", "test"):
        folder = source / "AISHELL-2/AISHELL-2/iOS" / split
        for number in range(3):
            write(
                folder / f"wav/C0001/IC0001W000{number}.wav", damaged(number) if number == 2 else clip(number)
            )
        write(
            folder / "trans.txt",
            lines(*(f"IC0001W000{number}\t{text}" for number, text in enumerate(CHINESE))),
        )

    write(source / "AISHELL-3/spk-info.txt", "# a\n# b\nSSB0005\tB\tfemale\tnorth\n")
    write(source / "AISHELL-3/train/label_train-set.txt", "# a\nSSB00050000|a1|b\n")
    for split in ("train", "test"):
        rows = []
        for number, text in enumerate(CHINESE):
            name = f"SSB0005000{number}.wav"
            write(
                source / f"AISHELL-3/{split}/wav/SSB0005/{name}",
                damaged(number) if number == 2 else clip(number),
            )
            rows.append(f"{name}\t{' '.join(f'{character} pin1' for character in text)}")
        write(source / f"AISHELL-3/{split}/content.txt", lines(*rows))

    for split in ("train_L", "train_M", "train_S", "test"):
        name = f"20200616_{split[-1]}_R001S01C01"
        write(source / f"AISHELL-4/{split}/wav/{name}.flac", clip(7, "flac", 9.0))
        speech = {
            "001-M": [(0.0, 2.0, CHINESE[0]), (3.0, 5.0, f"<sil>{CHINESE[1]}")],
            "002-F": [(4.0, 6.0, CHINESE[2])],
        }
        write(source / f"AISHELL-4/{split}/TextGrid/{name}.TextGrid", text_grid(9.0, speech))
    folder = "datasets/jsonl/shenyunhang"
    return {
        f"{folder}/AISHELL-1/train.jsonl": (2, DAMAGED | {"no_transcript": 3}),
        f"{folder}/AISHELL-1/dev.jsonl": (2, DAMAGED | {"no_transcript": 3}),
        f"{folder}/AISHELL-2/data.jsonl": (2, DAMAGED),
        f"{folder}/AISHELL-3/data.jsonl": (2, DAMAGED),
        f"{folder}/AISHELL-4/data.jsonl": (3, {"overlap": 6}),
    }


def text_grid(end: float, tiers: dict[str, list[tuple[float, float, str]]]) -> str:
    """Praat's long text format."""
    body = [
        'File type = "ooTextFile"',
        'Object class = "TextGrid"',
        "",
        "xmin = 0",
        f"xmax = {end}",
        "tiers? <exists>",
    ]
    body += [f"size = {len(tiers)}", "item []:"]
    for number, (name, marks) in enumerate(tiers.items(), 1):
        filled, at = [], 0.0
        for first, last, text in marks:
            filled += [(at, first, "")] if first > at else []
            filled.append((first, last, text))
            at = last
        filled += [(at, end, "")] if at < end else []
        body += [
            f"    item [{number}]:",
            '        class = "IntervalTier"',
            f'        name = "{name}"',
            "        xmin = 0",
        ]
        body += [f"        xmax = {end}", f"        intervals: size = {len(filled)}"]
        for index, (first, last, text) in enumerate(filled, 1):
            body += [
                f"        intervals [{index}]:",
                f"            xmin = {first}",
                f"            xmax = {last}",
            ]
            body += [f'            text = "{text}"']
    return "\n".join(body) + "\n"


def voice_assistant(source: Path) -> Expected:
    """The publisher's Parquet: answers are texts and codes of another codec."""
    rows = [
        {
            "split_name": "identity",
            "index": str(number),
            "round": "None",
            "question": text,
            "question_audio": {
                "bytes": damaged(number) if number == 2 else clip(number),
                "path": f"{number}.wav",
            },
            "answer": f"I think that {text}.",
            "answer_snac": "# 2682 # 1120",
        }
        for number, text in enumerate(ENGLISH)
    ]
    parquet(source / "data/train-00000-of-00325.parquet", rows)
    return {"datasets/jsonl/gpt-omni/VoiceAssistant-400K/data.jsonl": (2, DAMAGED)}


def audioqa(source: Path) -> Expected:
    """Turns that name recordings by the publisher's own paths; questions are unpacked, answers are in an archive."""
    conversations = []
    answers = {}
    for number, text in enumerate(CHINESE):
        question, answer = f"00000020{number}_question.wav", f"00000020{number}_F10.wav"
        write(source / f"QA_1450K_question_tar_16khz/question_shuf_part_8/wav/{question}", clip(number))
        answers[f"answer_part1_shuf_part_3/wav/{answer}"] = (
            damaged(number) if number == 2 else clip(10 + number)
        )
        turns = [
            {"role": "system", "content": "You are an AI robot and your name is Lucy."},
            {
                "role": "user",
                "content": text,
                "wavpath": f"/mnt/QA_1450K_question_tar_16khz/question_shuf_part_8/wav/{question}",
            },
            {
                "role": "assistant",
                "content": f"好的，{text}。",
                "wavpath": f"/mnt/QA_1450K_answer_part1_tar_16khz/answer_part1_shuf_part_3/wav/{answer}",
                "speaker": "F10",
            },
        ]
        conversations.append({"conversations": turns})
    tar(source / "QA_1450K_answer_part1_tar_16khz/answer_part1_shuf_part_3.tar", answers)
    write(source / "train.json", json.dumps(conversations, ensure_ascii=False))
    return {"datasets/jsonl/VITA-MLLM/AudioQA-1M/data.jsonl": (2, DAMAGED)}


def text_set(folder: str, files: dict[str, tuple[str, list[dict | str]]]):
    """A maker of text sets: outputs by name, with the publisher's file and rows. A broken line is rejected."""

    def make(source: Path) -> Expected:
        for file, rows in files.values():
            write_rows(source / file, rows)
        bad = {"bad_row": 1}
        return {
            f"datasets/jsonl/{folder}/{name}": (
                sum(isinstance(row, dict) for row in rows),
                bad if any(isinstance(row, str) for row in rows) else {},
            )
            for name, (_, rows) in files.items()
        }

    return make


def write_rows(path: Path, rows: list[dict | str]) -> None:
    if path.suffix == ".parquet":
        parquet(path, [row for row in rows if isinstance(row, dict)])
    elif path.suffix == ".json":
        write(path, json.dumps(rows))
    elif path.suffix == ".csv":
        write(path, table(rows, ","))
    elif path.suffix == ".zst":
        write(path, pyarrow.compress(lines(*rows).encode(), "zstd", asbytes=True))
    elif path.suffix == ".zip":
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(path, "w") as archive:
            for number, row in enumerate(rows):
                archive.writestr(f"math/{number:03d}.json", json.dumps(row))
    else:
        write(path, lines(*rows))


def human(*turns: str) -> list[dict]:
    return [{"from": ("human", "gpt")[number % 2], "value": turn} for number, turn in enumerate(turns)]


def roles(*turns: str) -> list[dict]:
    return [{"role": ("user", "assistant")[number % 2], "content": turn} for number, turn in enumerate(turns)]


Q, A = "What is two plus two?", "It is four."
BROKEN = '{"instruction": "cut off'
PAIR = {"instruction": Q, "output": A}
LONG_NAMES = (
    "booksum_en multi_doc_qa_en_paraphrasing sharegpt_en short_instruction_from_alpaca_en translation_en2zh "
    "single_doc_qa_en_paraphrasing booksum_zh multi_doc_qa_zh_paraphrasing sharegpt_zh "
    "short_instruction_from_llama_chinese single_doc_qa_zh_paraphrasing"
).split()
LONG_DATA = "togethercomputer/Long-Data-Collections"
COMPLETION = {"text": f"{Q} {A}", "prompt": Q, "completion": A}
NEMOTRON = {"input": roles(Q), "output": A, "reasoning": "off", "category": "chat"}

MINIATURES: dict[str, Callable[[Path], Expected]] = {
    "wenet-e2e/wenetspeech": wenetspeech,
    "Wenetspeech4TTS/Wenetspeech4TTS": wenetspeech4tts,
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
    "mozilla-foundation/common_voice_17_0": common_voice,
    "MushanW/GLOBE_V2": parquet_set(
        "MushanW/GLOBE_V2",
        {"train.jsonl": "data/train-00000-of-00123.parquet"},
        {"audio": "audio", "text": "transcript", "speaker": "speaker_id"},
        accent="England English",
        duration=1.5,
    ),
    "amphion/Emilia-Dataset": emilia,
    "amphion/Emilia-Dataset/speaker_prompt": lambda source: emilia(source, prompt=True),
    "openslr": magicdata,
    "speechcolab/gigaspeech": gigaspeech,
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
    "facebook/voxpopuli": voxpopuli,
    "shenyunhang": aishell,
    "gpt-omni/VoiceAssistant-400K": voice_assistant,
    "VITA-MLLM/AudioQA-1M": audioqa,
    "BAAI/Infinity-Instruct": text_set(
        "BAAI/Infinity-Instruct",
        {
            "0625.jsonl": (
                "0625/train-00000-of-00005.parquet",
                [{"conversations": human(Q, A), "source": "code"}] * 3,
            )
        },
    ),
    "OpenHermes": text_set(
        "teknium/OpenHermes-2.5",
        {
            "openhermes2_5.jsonl": (
                "openhermes2_5.json",
                [{"conversations": [{"from": "system", "value": "Be brief."}, *human(Q, A)], "source": "x"}]
                * 3,
            )
        },
    ),
    "lima": text_set(
        "GAIR/lima",
        {
            "train.jsonl": (
                "train.jsonl",
                [{"conversations": [Q, A, "And five?", "Five."], "source": "x"}, BROKEN],
            )
        },
    ),
    "databricks-dolly-15k": text_set(
        "databricks/databricks-dolly-15k",
        {
            "databricks-dolly-15k.jsonl": (
                "databricks-dolly-15k.jsonl",
                [{"instruction": Q, "context": "", "response": A, "category": "qa"}, BROKEN],
            )
        },
    ),
    "MetaMathQA": text_set(
        "meta-math/MetaMathQA",
        {
            "MetaMathQA-395K.jsonl": (
                "MetaMathQA-395K.json",
                [{"type": "x", "query": Q, "response": A, "original_question": Q}],
            )
        },
    ),
    "MathInstruct": text_set(
        "TIGER-Lab/MathInstruct", {"MathInstruct.jsonl": ("MathInstruct.json", [{"source": "x", **PAIR}])}
    ),
    "orca-math-word-problems-200k": text_set(
        "microsoft/orca-math-word-problems-200k",
        {"data.jsonl": ("data/train-00000-of-00001.parquet", [{"question": Q, "answer": A}])},
    ),
    "atlas-math-sets": text_set(
        "AtlasUnified/atlas-math-sets", {"train.jsonl": ("data/atlas-math-train.jsonl", [PAIR, BROKEN])}
    ),
    "goat": text_set(
        "tiedong/goat", {"dataset.jsonl": ("dataset.json", [{**PAIR, "input": "2 + 2", "answer": "4"}])}
    ),
    "camel-ai": text_set(
        "camel-ai/math",
        {
            "math.jsonl": (
                "math.zip",
                [{"role_1": "x", "topic;": "y", "sub_topic": "z", "message_1": Q, "message_2": A}] * 2,
            )
        },
    ),
    "Long-Instruction-with-Paraphrasing": text_set(
        "yuyijiong/Long-Instruction-with-Paraphrasing",
        {
            f"{name}.jsonl": (
                f"Long-instruction-{'zh' if 'zh' in name else 'en'}/{name}.jsonl",
                [{"messages": roles(Q, A)}, BROKEN],
            )
            for name in LONG_NAMES
        },
    ),
    "Long": text_set(
        "",
        {
            "akoksal/LongForm/data.jsonl": (
                "akoksal/LongForm/data/train-00000-of-00001.parquet",
                [{"input": Q, "output": A, "source": "x"}],
            ),
            "THUDM/LongAlign-10k/long.jsonl": (
                "THUDM/LongAlign-10k/long.jsonl",
                [{"messages": roles(Q, A), "length": 9}, BROKEN],
            ),
            "THUDM/LongCite-45k/long.jsonl": (
                "THUDM/LongCite-45k/long.jsonl",
                [{"prompt": Q, "response": A}],
            ),
            "THUDM/LongWriter-6k/long.jsonl": ("THUDM/LongWriter-6k/long.jsonl", [{"messages": roles(Q, A)}]),
            "YeungNLP/LongQLoRA-Dataset/LongQLoRA-SFT-Data-39k.jsonl": (
                "YeungNLP/LongQLoRA-Dataset/LongQLoRA-SFT-Data-39k.jsonl",
                [{"conversation_id": 1, "category": "x", "conversation": [{"human": Q, "assistant": A}]}],
            ),
            "Yukang/LongAlpaca-12k/LongAlpaca-12k.jsonl": (
                "Yukang/LongAlpaca-12k/LongAlpaca-12k.json",
                [{**PAIR, "input": "", "file": "x"}],
            ),
            f"{LONG_DATA}/natural_questions_10_200_docs.jsonl": (
                f"{LONG_DATA}/fine-tune/natural_questions_10_200_docs.jsonl.zst",
                [COMPLETION],
            ),
            f"{LONG_DATA}/booksum.jsonl": (f"{LONG_DATA}/fine-tune/booksum.jsonl.zst", [COMPLETION, BROKEN]),
            "KnutJaegersberg/longinstruct/longinstruct.jsonl": (
                "KnutJaegersberg/longinstruct/longinstruct.csv",
                [{"prompt": Q, "response": A}],
            ),
        },
    ),
    "open-thoughts/OpenThoughts2-1M": text_set(
        "open-thoughts/OpenThoughts2-1M",
        {
            "data.jsonl": (
                "data/train-00000-of-00038.parquet",
                [
                    {
                        "conversations": [{"from": "user", "value": Q}, {"from": "assistant", "value": A}],
                        "question": Q,
                    }
                ],
            )
        },
    ),
    "nvidia/Llama-Nemotron-Post-Training-Dataset": text_set(
        "nvidia/Llama-Nemotron-Post-Training-Dataset",
        {
            "SFT_chat.jsonl": ("SFT/chat/chat.jsonl", [NEMOTRON, BROKEN]),
            "SFT_code.jsonl": ("SFT/code/code_v1.1.jsonl", [NEMOTRON]),
            "SFT_science.jsonl": ("SFT/science/science.jsonl", [NEMOTRON]),
        },
    ),
    "glaiveai/reasoning-v1-20m": text_set(
        "glaiveai/reasoning-v1-20m",
        {"data.jsonl": ("data/train-00000-of-00240.parquet", [{"prompt": Q, "response": A}])},
    ),
    "nvidia/OpenCodeReasoning": text_set(
        "nvidia/OpenCodeReasoning",
        {
            "split_0.jsonl": (
                "split_0/train-00000-of-00030.parquet",
                [{"id": "1", "input": Q, "output": A, "source": "x"}],
            )
        },
    ),
    "Congliu/Chinese-DeepSeek-R1-Distill-data-110k-SFT": text_set(
        "Congliu/Chinese-DeepSeek-R1-Distill-data-110k-SFT",
        {"data.jsonl": ("distill_r1_110k_sft.jsonl", [{**PAIR, "input": "", "score": 10}, BROKEN])},
    ),
    "open-r1/OpenR1-Math-220k": text_set(
        "open-r1/OpenR1-Math-220k",
        {
            "all.jsonl": (
                "all/default-00000-of-00020.parquet",
                [{"problem": Q, "solution": A, "messages": roles(Q, A)}],
            )
        },
    ),
}


@pytest.fixture(scope="session")
def miniatures() -> dict[str, Callable[[Path], Expected]]:
    """A maker for each set of the published mix: it writes a release into a folder, and returns what it must give."""
    return MINIATURES


@pytest.fixture(scope="session")
def sound() -> Callable[..., bytes]:
    """Content of a short audio file, by seed and format."""
    return clip
