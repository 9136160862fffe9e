"""Items to checked samples: the same steps for every corpus.

Text is normalised and checked, the clip is decoded and checked, then placed; the samples of the recipe's tasks are
built and checked by :func:`vita_audio.chat.parse_sample`, which training uses too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from vita_audio.audio import AudioError
from vita_audio.chat import SampleError, parse_sample
from vita_audio.chat.sample import check_messages
from vita_audio.constants import ASR_PROMPT, AUDIO_TAG, TTS_PROMPT, VOICE_PROMPT
from vita_audio.corpora.cleaning import Cleaning, Recogniser, Rejection, Tally
from vita_audio.corpora.clips import ClipStore, decode
from vita_audio.corpora.hygiene import TestSetIndex, sentences_of
from vita_audio.corpora.items import Broken, Clip, Dialogue, Item, Rejected, Utterance
from vita_audio.corpora.normalisers import normalise
from vita_audio.corpora.recipes import Part

Sample = dict[str, Any]


@dataclass
class Builder:
    """Turns the items of one unit into samples, and counts.

    Attributes:
        part: the output that the samples are for; its tasks say which samples an utterance becomes.
        held_out: test sets; None: not checked.
        recogniser: None: agreement is not checked.
    """

    part: Part
    cleaning: Cleaning
    store: ClipStore
    held_out: TestSetIndex | None = None
    recogniser: Recogniser | None = None
    tally: Tally = field(default_factory=Tally)
    _seen: set[str] = field(default_factory=set)
    _prompts: dict[str, str] = field(default_factory=dict)

    def build(self, item: Item) -> list[Sample]:
        """The samples of an item.

        Raises:
            Rejected: there are none. The reason is counted.
        """
        self.tally.read += 1
        try:
            samples = list(self._samples(item))
            for sample in samples:
                parse_sample(sample)
        except (AudioError, SampleError, Rejected) as error:
            reason = f"audio_{error.reason}" if isinstance(error, AudioError) else error.reason
            self.tally.rejected[reason] += 1
            raise Rejected(reason, str(error)) from error
        self.tally.samples += len(samples)
        return samples

    def _samples(self, item: Item) -> Iterator[Sample]:
        if isinstance(item, Broken):
            raise Rejected(item.reason, item.message)
        if item.id in self._seen:
            raise Rejected(Rejection.REPEATED, f"{item.id} occurs twice")
        self._seen.add(item.id)
        if isinstance(item, Dialogue):
            yield self._dialogue(item)
        else:
            yield from self._utterance(item)

    def _utterance(self, item: Utterance) -> Iterator[Sample]:
        text = normalise(item.text, self.part.normalise)
        self.cleaning.check_text(text, self.part.languages)
        path = self._clip(item.id, item.clip, text)
        prompt = self._prompts.get(item.speaker) if item.speaker else None
        if item.speaker:
            self._prompts[item.speaker] = path
        tasks = [task for task in self.part.tasks if task != "clone" or prompt is not None]
        if not tasks:
            raise Rejected(
                Rejection.NO_PROMPT, f"{item.id}: no earlier clip of its speaker, so no voice prompt"
            )
        for task in tasks:
            messages, audios = _task(task, text, path, prompt)
            yield {"id": item.id, "messages": messages, "audios": audios}

    def _dialogue(self, item: Dialogue) -> Sample:
        messages = [
            {
                key: normalise(value, self.part.normalise) if _is_content(key, value) else value
                for key, value in turn.items()
            }
            for turn in item.messages
        ]
        spoken = " ".join(
            str(value) for turn in messages for key, value in turn.items() if _is_content(key, value)
        )
        if self.part.languages:
            self.cleaning.check_text(spoken.replace(AUDIO_TAG, " "), self.part.languages)
        for sentence in sentences_of(check_messages(messages)) if self.held_out is not None else ():
            self._check_held_out(sentence, None, 0)
        texts: Sequence[str | None] = item.texts or (None,) * len(item.clips)
        audios = [
            self._clip(item.id if len(item.clips) == 1 else f"{item.id}-{number}", clip, text)
            for number, (clip, text) in enumerate(zip(item.clips, texts, strict=True))
        ]
        sample: Sample = {"id": item.id, "messages": messages}
        if audios:
            sample["audios"] = audios
        if item.answers:
            sample["answers"] = list(item.answers)
        return sample

    def _clip(self, name: str, clip: Clip, text: str | None) -> str:
        """Check a clip and place it."""
        waveform, rate = decode(clip)
        seconds = len(waveform) / rate
        said = text if text is not None else "x" * round(10 * seconds)  # an ordinary speed
        self.tally.measure("before", said, seconds)
        self.cleaning.check_speed(said, seconds)
        self.cleaning.check_waveform(waveform, rate)
        if self.held_out is not None:
            self._check_held_out(text, waveform, rate)
        if self.recogniser is not None and text is not None:
            error_rate, heard = self.recogniser(waveform, rate, text)
            if error_rate > self.cleaning.max_wer:
                raise Rejected(
                    Rejection.DISAGREES, f"{error_rate:.0%} wrong: {text!r:.80} is heard as {heard!r:.80}"
                )
        self.tally.measure("after", said, seconds)
        self.tally.seconds += seconds
        return self.store.place(name, clip, waveform, rate)

    def _check_held_out(self, text: str | None, waveform: Tensor | None, rate: int) -> None:
        assert self.held_out is not None
        place = self.held_out.find(text, waveform, rate)
        if place is not None:
            raise Rejected(Rejection.IN_TEST_SET, f"also in {place}")


def _is_content(key: str, value: Any) -> bool:
    return key in ("content", "value") and isinstance(value, str)


def _task(task: str, text: str, path: str, prompt: str | None) -> tuple[list[dict[str, str]], list[str]]:
    """Messages and audios of a sample."""
    if task == "asr":
        turns = [("user", f"{ASR_PROMPT}\n{AUDIO_TAG}"), ("assistant", text)]
        audios = [path]
    else:
        turns = [("user", f"{TTS_PROMPT}\n{text}"), ("assistant", AUDIO_TAG)]
        audios = [path]
        if task == "clone" and prompt is not None:
            turns, audios = [("system", VOICE_PROMPT), *turns], [prompt, path]
    return [{"role": role, "content": content} for role, content in turns], audios
