"""The benchmark interface: how test sets are read, answered and scored, and which columns result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from vita_audio.evaluation.bench import Bench
from vita_audio.evaluation.items import AnyPath, BenchmarkItem, Items
from vita_audio.evaluation.journal import Utterance
from vita_audio.evaluation.statistics import Marks
from vita_audio.inference import GenerationOptions

Scores = dict[str, float | int | None]


@dataclass(frozen=True)
class Column:
    """A column of the table.

    Attributes:
        title: short title, for a table of one test set.
        key: key in a row.
        form: format of a number, after multiplication by ``scale``; empty for text.
    """

    title: str
    key: str
    form: str = ".1f"
    scale: float = 100

    @property
    def is_text(self) -> bool:
        return not self.form

    def cell(self, row: dict[str, object]) -> str:
        """The row's value as displayed; a dash if there is none."""
        value = row.get(self.key)
        if value is None:
            return "–"
        return (
            format(self.scale * value, self.form)
            if isinstance(value, (int, float)) and self.form
            else str(value)
        )


class Task(Protocol):
    """A benchmark.

    Attributes:
        name: name in flags and files.
        title: name in tables.
        columns: the columns it adds to a row.
        speaks: whether the model's speech is scored, which needs a recogniser.
        samples: whether replies are sampled instead of greedy with the published decoding.
        open_system: whether questions without a system message get one.
    """

    @property
    def name(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def columns(self) -> tuple[Column, ...]: ...
    @property
    def speaks(self) -> bool: ...
    @property
    def samples(self) -> bool: ...
    @property
    def open_system(self) -> bool: ...

    def read(self, path: AnyPath, data_root: AnyPath | None = None, limit: int | None = None) -> Items:
        """The items of a test set.

        Raises:
            ValueError: the file is missing or empty, or a line cannot be scored; the message names file and line.
        """

    def is_as_trained(self, item: BenchmarkItem) -> bool:
        """Whether the prompt is worded as in the training data."""

    def run(self, bench: Bench, items: Sequence[BenchmarkItem]) -> list[Utterance]:
        """Answer every item."""

    def marks(self, utterance: Utterance) -> Marks:
        """What an utterance adds to each score."""

    def score(self, utterances: Sequence[Utterance]) -> Scores:
        """Scores of a whole test set; rates are fractions.

        Raises:
            ValueError: there is nothing to score.
        """


def published_options(task: Task, options: GenerationOptions) -> GenerationOptions:
    """The generation options behind a task's published figures.

    Speech synthesis samples with the temperature and limits in the checkpoint's generation_config.json. The others
    decode greedily. All keep the checkpoint's repetition penalty.
    """
    open_choices = {"temperature": None, "top_k": None, "top_p": None, "repetition_penalty": None}
    return replace(options, do_sample=task.samples, **open_choices)  # type: ignore[arg-type]


def need_utterances(utterances: Sequence[Utterance]) -> None:
    """
    Raises:
        ValueError: there are none.
    """
    if not utterances:
        raise ValueError("no utterances, so there is nothing to score")


def need_words(count: float) -> None:
    """
    Raises:
        ValueError: the references contain no words, so the rate is undefined.
    """
    if not count:
        raise ValueError("the references contain no words; there is nothing to score against")
