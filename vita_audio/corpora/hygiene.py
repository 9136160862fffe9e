"""Test sets stay out of training: their sentences and recordings are known by digests.

A sentence is compared by its letters and digits, without case; short ones, which occur everywhere, are not
compared. A recording is compared by its decoded samples, so a copy is found in any lossless format, but not after
lossy compression or resampling.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from vita_audio.audio import AudioError, load_audio
from vita_audio.audio.io import audio_duration
from vita_audio.chat import Message, Sample, prompts, read_samples
from vita_audio.constants import ASR_PROMPT
from vita_audio.corpora.text import characters

SHORTEST_SENTENCE = 20
"""Letters and digits; a Chinese character counts as three."""


@dataclass
class TestSetIndex:
    """Sentences and recordings of test sets.

    Attributes:
        sentences: place by digest.
        recordings: by rate and number of samples: place by digest.
    """

    __test__ = False  # for pytest: not a test

    sentences: dict[bytes, str] = field(default_factory=dict)
    recordings: dict[tuple[int, int], dict[bytes, str]] = field(default_factory=dict)

    @classmethod
    def of(cls, files: Iterable[str | Path], data_root: str | Path | None = None) -> TestSetIndex:
        """Read test sets.

        Args:
            data_root: base of their audio paths.

        Raises:
            SampleFileError: a file, or a sample in it, cannot be used.
            AudioError: a recording cannot be read: without it nothing can be said about copies.
        """
        index = cls()
        for file in files:
            for number, sample in read_samples(file, data_root, answer_lists=True):
                index.add(sample, f"{file}:{number}")
        return index

    def add(self, sample: Sample, place: str) -> None:
        """Add the sentences and recordings of a sample."""
        for sentence in (*sentences_of(sample.messages), *sample.answers):
            key = _sentence_key(sentence)
            if key is not None:
                self.sentences.setdefault(key, place)
        for audio in sample.audios:
            waveform, rate = load_audio(audio)
            same_length = self.recordings.setdefault((rate, len(waveform)), {})
            same_length.setdefault(_waveform_key(waveform), place)

    def find(self, text: str | None, waveform: Tensor | None, rate: int) -> str | None:
        """The place of a test sentence or recording that equals this one; None if there is none."""
        key = _sentence_key(text) if text is not None else None
        if key in self.sentences and key is not None:
            return self.sentences[key]
        if waveform is None:
            return None
        same_length = self.recordings.get((rate, len(waveform)))
        return None if same_length is None else same_length.get(_waveform_key(waveform))

    def overlaps(self, sample: Sample, *, audio: bool = True) -> Iterator[tuple[str, str]]:
        """What a sample has in common with the test sets: a sentence or a path, and the place in a test set.

        Recordings that cannot be read are skipped: training cannot read them either. Others are decoded only if
        some recording of a test set is as long.

        Args:
            audio: also compare recordings.
        """
        for sentence in sentences_of(sample.messages):
            place = self.find(sentence, None, 0)
            if place is not None:
                yield sentence, place
        for clip in sample.audios if audio else ():
            try:
                if round(audio_duration(clip) * 1000) not in self._lengths:
                    continue
                waveform, rate = load_audio(clip)
            except AudioError:
                continue
            place = self.find(None, waveform, rate)
            if place is not None:
                yield str(clip), place

    @property
    def num_recordings(self) -> int:
        return sum(map(len, self.recordings.values()))

    @cached_property
    def _lengths(self) -> frozenset[int]:
        """Milliseconds of the recordings."""
        return frozenset(round(samples / rate * 1000) for rate, samples in self.recordings)

    @property
    def fingerprint(self) -> str:
        """A digest of the index."""
        keys = [*self.sentences, *(key for same in self.recordings.values() for key in same)]
        return hashlib.sha256(b"".join(sorted(keys))).hexdigest()[:16]


def sentences_of(messages: Iterable[Message]) -> Iterator[str]:
    """Texts that are spoken or learnt, without the words of their task."""
    for message in messages:
        text = prompts.requested_text(message) or message.text.replace(ASR_PROMPT, "")
        if text.strip() and message.role != "system":
            yield text.strip()


def _sentence_key(text: str) -> bytes | None:
    letters = "".join(character for character in text.casefold() if character.isalnum())
    han = sum("\u3400" <= character <= "\u9fff" for character in letters)
    if characters(letters) + 2 * han < SHORTEST_SENTENCE:
        return None
    return hashlib.blake2b(letters.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _waveform_key(waveform: Tensor) -> bytes:
    samples = (waveform * 32768).round().clamp(-32768, 32767).to(torch.int16)
    return hashlib.blake2b(samples.numpy().tobytes(), digest_size=16).digest()
