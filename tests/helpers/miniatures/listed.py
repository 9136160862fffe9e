"""Speech sets of single files, which lhotse lists."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from miniatures.files import CHINESE, DAMAGED, Expected, clip, damaged, lines, write


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


LISTED: dict[str, Callable[[Path], Expected]] = {
    "Wenetspeech4TTS/Wenetspeech4TTS": wenetspeech4tts,
    "openslr": magicdata,
    "shenyunhang": aishell,
}
