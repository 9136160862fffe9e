"""What a benchmark is: how its test sets are read, answered and scored, and which columns it fills."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Protocol

from vita_audio.evaluation.benchmarks import Bench, BenchmarkItem, Utterance
from vita_audio.inference import GenerationOptions

Scores = dict[str, float | int | None]


@dataclass(frozen=True)
class Column:
    """A column of the table.

    Attributes:
        title: short, as it stands in a table of one test set.
        key: of a row.
        form: how a number is written, after multiplication by ``scale``; empty for text.
    """

    title: str
    key: str
    form: str = ".1f"
    scale: float = 100

    @property
    def is_text(self) -> bool:
        return not self.form

    def cell(self, row: dict[str, object]) -> str:
        """The row's value as people read it; a dash where there is none."""
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
        name: in flags and files.
        title: in tables.
        columns: what it adds to a row.
        speaks: whether the model's speech is scored, which takes a recogniser.
        samples: whether replies are drawn, not taken greedily, when scores are made as published.
        open_system: whether its questions take a system message when they have none.
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

    def read(
        self, path: str | PathLike[str], data_root: str | PathLike[str] | None, limit: int | None
    ) -> list[BenchmarkItem]:
        """The items of a test set.

        Raises:
            ValueError: the file is missing or empty, or a line cannot be scored; names file and line.
        """

    def is_as_trained(self, item: BenchmarkItem) -> bool:
        """Whether the item is asked in the wording of the training data."""

    def run(self, bench: Bench, items: Sequence[BenchmarkItem]) -> list[Utterance]:
        """Answer every item."""

    def score(self, utterances: Sequence[Utterance]) -> Scores:
        """Figures of a whole test set, fractions where they are shares.

        Raises:
            ValueError: there is nothing to score.
        """


def published_options(task: Task, options: GenerationOptions) -> GenerationOptions:
    """Options by which the published figures of a task were made.

    Speech synthesis draws with the temperature and limits in the checkpoint's generation_config.json, the others
    decode greedily; all keep the checkpoint's repetition penalty.
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
