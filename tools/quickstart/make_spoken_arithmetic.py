"""A small spoken corpus: digit strings and sums, synthesised by espeak-ng.

    python tools/quickstart/make_spoken_arithmetic.py --out corpus --utterances 8000

It is large enough to learn every task from and small enough to master in minutes. Several voices
ask; one clear voice answers and reads aloud; voice cloning adds two more. The output is
``{asr,tts,sqa,text_qa,voice_clone}_{train,dev,test}.jsonl`` (the training data's format, audio paths
relative to the folder), ``examples.jsonl`` (one test sample of each task), ``question.wav`` (the recording of a test
question) and ``grammar.jsgf`` (every possible utterance, for a recogniser).

* ASR: digit strings and questions in many voices, and in training also the speech of the other tasks, except for
  replies to questions.
* TTS and voice cloning: digit strings.
* Speech and text QA: "what is three plus five" in several wordings -> "three plus five is eight".

A sentence (asked, transcribed or read) belongs to one split, across all tasks. All pairs of
numbers occur in training, but a test question's wording of its pair does not. The replies to questions,
a hundred in all, recur.

Recordings contain faint room noise, since digital silence confuses the evaluation's recogniser.
The same seed gives the same files; an interrupted run continues.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
from espeak import Synthesiser, Voice, open_synthesiser
from tqdm import tqdm

from vita_audio.cli.arguments import command_parser, run_command
from vita_audio.constants import ASR_PROMPT, AUDIO_TAG, TTS_PROMPT, VOICE_PROMPT
from vita_audio.files import whole_file, write_json_lines, write_text

SAMPLE_RATE = 16_000
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEENS = ("ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen")
NUMBERS = DIGITS + TEENS
QUESTIONS = (
    "what is {} plus {}",
    "how much is {} plus {}",
    "what is the sum of {} and {}",
    "add {} and {}",
    "tell me {} plus {}",
    "what do {} and {} make",
    "add {} to {}",
    "what does {} plus {} equal",
)
ANSWER = "{} plus {} is {}"
Row = dict[str, Any]
TASKS = ("asr", "tts", "sqa", "text_qa", "voice_clone")
SPLITS = ("train", "dev", "test")

# Voices for which the evaluation's recogniser has at most 15% word errors, both on the recordings and after
# a codec of 512 codes (docs/log.md).
SPEAKING_VOICE = Voice("en-us+klatt3", 170, 50)
CLONING_VOICES = (SPEAKING_VOICE, Voice("en-us", 170, 50), Voice("en-us+edward", 165, 65))
ASKING_VOICES = ("en-us", "en-gb-x-rp", "en-us+m5", "en-us+m6", "en-us+klatt3")
ASKING_WORDS_PER_MINUTE = (155, 190)
ASKING_PITCH = (35, 65)

# Shares of the utterances to synthesise; text QA needs none.
SHARES = {"asr": 0.4, "tts": 0.26, "sqa": 0.23, "voice_clone": 0.11}
HELD_OUT_SHARE = {"dev": 0.02, "test": 0.04}
FEWEST_HELD_OUT = 4

MARGIN_SECONDS = 0.08
LEVEL = 0.1  # root mean square
NOISE_LEVEL = 10 ** (-50 / 20)
UTTERANCES_PER_PROCESS = 32


@dataclass(frozen=True)
class Clip:
    """One utterance to synthesise."""

    text: str
    voice: Voice

    @property
    def key(self) -> str:
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]

    @property
    def path(self) -> str:
        """Relative to the corpus folder."""
        return f"audio/{self.voice.name.replace('+', '_')}/{self.key}.wav"


@dataclass(frozen=True)
class Question:
    """The question "what is ``first`` plus ``second``", in one of several wordings."""

    wording: str
    first: int
    second: int

    @property
    def text(self) -> str:
        return self.wording.format(DIGITS[self.first], DIGITS[self.second])

    @property
    def number(self) -> str:
        return NUMBERS[self.first + self.second]

    @property
    def reply(self) -> str:
        return ANSWER.format(DIGITS[self.first], DIGITS[self.second], self.number)


def main(argv: Sequence[str] | None = None) -> None:
    parser = command_parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--utterances", type=int, default=8000, metavar="N", help="approximate number of WAV files"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), metavar="N", help="processes")
    args = parser.parse_args(argv)
    if args.utterances < 100 or args.utterances > 100_000:
        parser.error(f"--utterances {args.utterances}: give 100 to 100000")
    if args.workers < 1:
        parser.error(f"--workers {args.workers}: give 1 or more")
    make_corpus(args.out, args.utterances, args.seed, args.workers)


def make_corpus(out: Path, utterances: int, seed: int = 0, workers: int = 2) -> None:
    """Write the whole corpus; existing clips are kept.

    Raises:
        SynthesiserError: espeak-ng is missing.
        OSError: the folder cannot be written.
    """
    synthesiser = open_synthesiser()
    clips: dict[Clip, None] = {}  # in order of first use
    rows = {name: [] for name in (f"{task}_{split}" for task in TASKS for split in SPLITS)}
    for task, split, row, row_clips in plan(utterances, seed):
        clips.update(dict.fromkeys(row_clips))
        name = f"{task}_{split}"
        rows[name].append({"id": f"{name}_{len(rows[name])}", **row})
    out.mkdir(parents=True, exist_ok=True)
    record(list(clips), out, synthesiser, workers)
    for name, samples in rows.items():
        write_json_lines(out / f"{name}.jsonl", samples)
    write_json_lines(out / "examples.jsonl", [rows[f"{task}_test"][0] for task in TASKS])
    write_text(out / "grammar.jsgf", grammar())
    with whole_file(out / "question.wav") as temporary:
        shutil.copyfile(out / rows["sqa_test"][0]["audios"][0], temporary)
    counts = ", ".join(f"{task} {sum(len(rows[f'{task}_{split}']) for split in SPLITS)}" for task in TASKS)
    print(f"{len(clips)} recordings in {out}; samples: {counts}")


# -- sentences ----------------------------------------------------------------------------------------


def plan(utterances: int, seed: int) -> Iterator[tuple[str, str, Row, list[Clip]]]:
    """Every sample as task, split, JSON row and its clips in the order of the row's audios."""
    rng = random.Random(seed)
    counts = {
        task: {split: split_size(share * utterances, split) for split in SPLITS}
        for task, share in SHARES.items()
    }
    questions = split_questions(rng, counts["sqa"])
    strings = digit_strings(rng)
    for split in SPLITS:
        for index in range(counts["asr"][split]):
            # A third of the transcribed speech is questions.
            text = rng.choice(questions[split]).text if index % 3 == 0 else next(strings)
            yield "asr", split, *asr_row(Clip(text, asking_voice(rng)))
        also_transcribed = []
        for _ in range(counts["tts"][split]):
            also_transcribed.append(Clip(next(strings), SPEAKING_VOICE))
            yield "tts", split, *tts_row(also_transcribed[-1])
        for index in range(counts["sqa"][split]):
            question = questions[split][index % len(questions[split])]
            also_transcribed.append(Clip(question.text, asking_voice(rng)))
            yield "sqa", split, *sqa_row(question, also_transcribed[-1])
        for question in questions[split]:
            yield "text_qa", split, *text_qa_row(question)
        prompts: dict[Voice, Clip] = {}
        for index in range(counts["voice_clone"][split]):
            clip = Clip(next(strings), CLONING_VOICES[index % len(CLONING_VOICES)])
            # The previous recording in the same voice is the voice prompt.
            prompt = prompts.get(clip.voice) or Clip(next(strings), clip.voice)
            prompts[clip.voice] = clip
            also_transcribed.append(clip)
            yield "voice_clone", split, *voice_clone_row(prompt, clip)
        if split == "train":
            for clip in also_transcribed:
                yield "asr", split, *asr_row(clip)


def split_size(total: float, split: str) -> int:
    held_out = {name: max(FEWEST_HELD_OUT, round(total * share)) for name, share in HELD_OUT_SHARE.items()}
    return held_out.get(split, round(total) - sum(held_out.values()))


def split_questions(rng: random.Random, counts: dict[str, int]) -> dict[str, list[Question]]:
    """Questions, each in one split; every pair of numbers is in training."""
    wordings = {
        (a, b): rng.sample(QUESTIONS, len(QUESTIONS)) for a in range(len(DIGITS)) for b in range(len(DIGITS))
    }
    pairs = rng.sample(sorted(wordings), len(wordings))
    questions: dict[str, list[Question]] = {split: [] for split in SPLITS}
    for split in ("test", "dev"):
        for index in range(min(counts[split], len(pairs))):
            questions[split].append(Question(wordings[pairs[index]].pop(), *pairs[index]))
    questions["train"] = [Question(wording, *pair) for pair in pairs for wording in wordings[pair]]
    rng.shuffle(questions["train"])
    return questions


def digit_strings(rng: random.Random) -> Iterator[str]:
    """Two to five digits, each string once."""
    seen = set()
    while True:
        text = " ".join(rng.choices(DIGITS, k=rng.choice((2, 3, 3, 4, 4, 4, 5, 5))))
        if text not in seen:
            seen.add(text)
            yield text


def asking_voice(rng: random.Random) -> Voice:
    return Voice(rng.choice(ASKING_VOICES), rng.randint(*ASKING_WORDS_PER_MINUTE), rng.randint(*ASKING_PITCH))


def asr_row(clip: Clip) -> tuple[Row, list[Clip]]:
    return sample(user=f"{ASR_PROMPT}\n{AUDIO_TAG}", assistant=clip.text, clips=[clip])


def tts_row(clip: Clip) -> tuple[Row, list[Clip]]:
    return sample(user=f"{TTS_PROMPT}\n{clip.text}", assistant=AUDIO_TAG, clips=[clip])


def sqa_row(question: Question, asked: Clip) -> tuple[Row, list[Clip]]:
    reply = Clip(question.reply, SPEAKING_VOICE)
    row, clips = sample(user=AUDIO_TAG, assistant=f"{reply.text}\n{AUDIO_TAG}", clips=[asked, reply])
    return row | {"answers": [question.number], "question": question.text}, clips


def text_qa_row(question: Question) -> tuple[Row, list[Clip]]:
    row, clips = sample(user=question.text, assistant=question.reply, clips=[])
    return row | {"answers": [question.number]}, clips


def voice_clone_row(prompt: Clip, clip: Clip) -> tuple[Row, list[Clip]]:
    row, _ = tts_row(clip)
    row["messages"].insert(0, {"role": "system", "content": VOICE_PROMPT})
    return row | {"audios": [prompt.path, clip.path]}, [prompt, clip]


def sample(user: str, assistant: str, clips: list[Clip]) -> tuple[Row, list[Clip]]:
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    row = {"messages": messages}
    return row | {"audios": [clip.path for clip in clips]} if clips else row, clips


def grammar() -> str:
    """All sentences, in the JSpeech Grammar Format."""
    questions = "\n  | ".join(wording.replace("{}", "<digit>") for wording in QUESTIONS)
    return (
        "#JSGF V1.0;\n"
        "grammar arithmetic;\n"
        f"<digit> = {' | '.join(DIGITS)};\n"
        f"<number> = <digit> | {' | '.join(TEENS)};\n"
        f"public <utterance> = <digit>+\n  | {ANSWER.format('<digit>', '<digit>', '<number>')}\n  | {questions};\n"
    )


# -- recording -------------------------------------------------------------------------------------------


def record(clips: list[Clip], out: Path, synthesiser: Synthesiser, workers: int) -> None:
    """Synthesise missing clips.

    Each group of clips is synthesised by a fresh fork of an unused synthesiser, so a clip's samples depend
    only on its group and not on interruptions of the run.
    """
    groups = [clips[i : i + UTTERANCES_PER_PROCESS] for i in range(0, len(clips), UTTERANCES_PER_PROCESS)]
    missing = [group for group in groups if not all((out / clip.path).is_file() for clip in group)]
    with tqdm(total=len(clips), desc="speaking", unit="clip") as progress:
        progress.update(len(clips) - sum(map(len, missing)))
        if not missing:
            return
        context = get_context("fork")
        with context.Pool(
            workers, initializer=_inherit, initargs=(synthesiser, out), maxtasksperchild=1
        ) as pool:
            for count in pool.imap_unordered(_record_group, missing):
                progress.update(count)


def _inherit(synthesiser: Synthesiser, out: Path) -> None:
    global _synthesiser, _out
    _synthesiser, _out = synthesiser, out


def _record_group(clips: list[Clip]) -> int:
    for clip in clips:
        waveform = soxr.resample(
            _synthesiser.speak(clip.text, clip.voice), _synthesiser.sample_rate, SAMPLE_RATE
        )
        path = _out / clip.path
        with whole_file(path) as temporary:
            recording = in_a_room(waveform, clip.key)
            soundfile.write(temporary, recording, SAMPLE_RATE, format="WAV", subtype="PCM_16")
    return len(clips)


def in_a_room(waveform: np.ndarray, key: str) -> np.ndarray:
    """Normalise the loudness, and add a margin on both sides and faint noise."""
    waveform = waveform * (LEVEL / max(float(np.sqrt(np.mean(waveform**2))), 1e-4))
    waveform = np.pad(waveform, round(MARGIN_SECONDS * SAMPLE_RATE))
    noise = np.random.default_rng(int(key, 16)).normal(scale=NOISE_LEVEL, size=len(waveform))
    return np.clip(waveform + noise, -1, 1).astype(np.float32)


if __name__ == "__main__":
    run_command(main)
