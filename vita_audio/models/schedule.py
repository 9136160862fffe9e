"""The schedule of generation: how many tokens the backbone and then the heads make, in turn.

A schedule is a list of pairs [M1, m1, M2, m2, …]: M1 tokens from the backbone, m1 from the heads, and so on; the
last pair repeats until the reply ends (paper section 3.4; SPEC "Generation"). The paper's four have names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, cycle

SCHEDULES: dict[str, tuple[int, ...]] = {
    "vanilla": (8192, 0),
    "balance": (1, 4, 3, 8, 4, 10),
    "boost": (1, 10, 4, 10),
    "turbo": (1, 10),
}
"""The paper's schedules, from the slowest to the fastest."""

BACKBONE = -1
"""Marks a step whose token comes from the backbone, not from a head 0, 1, …"""

_NUMBERS = re.compile(r"[\[(]?\s*(\d+(?:(?:\s*,\s*|\s+|-)\d+)*)\s*[\])]?")


@dataclass(frozen=True)
class Schedule:
    """Pairs of (tokens from the backbone, tokens from the heads).

    Attributes:
        pairs: one or more; each has at least 1 token from the backbone and 0 or more from the heads.
    """

    pairs: tuple[tuple[int, int], ...]

    @classmethod
    def parse(cls, value: Schedule | str | Sequence[int]) -> Schedule:
        """A schedule from its name, from text such as ``"1 10 4 10"`` or ``"1-10-4-10"``, or from numbers.

        Raises:
            ValueError: an unknown name, or numbers that are not pairs of M >= 1 and m >= 0.
        """
        if isinstance(value, Schedule):
            return value
        if isinstance(value, str):
            numbers = _numbers(value)
        else:
            try:
                numbers = list(value)
            except TypeError:
                raise ValueError(f"mtp_inference_mode={value!r}: give a name or pairs of numbers") from None
        whole = all(isinstance(count, int) and not isinstance(count, bool) for count in numbers)
        if not numbers or len(numbers) % 2 or not whole or min(numbers[0::2]) < 1 or min(numbers[1::2]) < 0:
            raise ValueError(
                f"mtp_inference_mode={numbers}: give pairs M, m of whole numbers: M >= 1 tokens from the backbone, "
                "then m >= 0 from the heads, for example [1, 10, 4, 10]"
            )
        return cls(tuple(zip(numbers[0::2], numbers[1::2], strict=True)))

    @property
    def numbers(self) -> list[int]:
        """[M1, m1, M2, m2, …], the format of ``generate()`` and generation_config.json."""
        return [count for pair in self.pairs for count in pair]

    @property
    def name(self) -> str:
        """The paper's name, or the numbers separated by spaces."""
        numbers = tuple(self.numbers)
        names = [name for name, known in SCHEDULES.items() if known == numbers]
        return names[0] if names else " ".join(map(str, numbers))

    @property
    def longest_head_run(self) -> int:
        """The largest number of head tokens between two backbone tokens; 0 if the heads are idle."""
        return max(head_tokens for _, head_tokens in self.pairs)

    def rounds(self) -> Iterator[tuple[int, int]]:
        """The pairs in the order they run, endlessly."""
        return chain(self.pairs, cycle(self.pairs[-1:]))

    def steps(self, num_heads: int) -> Iterator[int]:
        """The source of each token, endlessly: BACKBONE or the index of a head.

        A run of head tokens that is longer than the number of heads takes one token from the backbone
        and continues with head 0.
        """
        for backbone_tokens, head_tokens in self.rounds():
            yield from [BACKBONE] * backbone_tokens
            for step in range(head_tokens):
                head = step % (num_heads + 1)
                yield BACKBONE if head == num_heads else head


def schedules_for(num_heads: int, names: Sequence[str]) -> list[str]:
    """The named schedules that a model with ``num_heads`` heads can run as intended.

    A schedule whose runs are longer than the number of heads would repeat the result of a shorter one, so
    it is left out. A model with few heads gets one schedule that uses all of them, ``"1 HEADS"``.
    """
    runs = {name: Schedule.parse(name).longest_head_run for name in names}
    fitting = [name for name in names if runs[name] <= num_heads]
    if num_heads and all(runs[name] == 0 for name in fitting):
        fitting.append(f"1 {num_heads}")
    return fitting


def _numbers(text: str) -> list[int]:
    name = text.strip().lower()
    match = _NUMBERS.fullmatch(name)
    if match:
        return [int(number) for number in re.findall(r"\d+", match[1])]
    if name not in SCHEDULES:
        raise ValueError(
            f"mtp_inference_mode={text!r}: use one of {', '.join(SCHEDULES)}, or numbers such as 1 10 4 10"
        )
    return list(SCHEDULES[name])
