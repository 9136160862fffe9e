"""The modes of a table: a schedule by name or numbers, or ``lossless``; either with ``+audio_rows``.

These are the engine's (docs/engine.md): ``lossless`` gives Vanilla's replies; ``audio_rows`` reads only the rows of
speech in the vocabulary between the markers of speech, ``audio_rows_on`` also for all tokens of the heads, so heads
that write text are wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vita_audio.inference import SCHEDULES, Schedule, schedules_for

LOSSLESS = "lossless"
FEATURES = {"": "off", "audio_rows": "auto", "audio_rows_on": "on"}
"""What can be added to a mode, with the engine's choice of rows."""
TRADEOFF = (*SCHEDULES, LOSSLESS, "boost+audio_rows", "turbo+audio_rows", "turbo+audio_rows_on")
"""The modes between quality and speed that a trade-off compares."""


def mode_fields(mode: str) -> dict[str, Any]:
    """The fields of :class:`~vita_audio.inference.GenerationOptions` that a mode sets.

    Raises:
        ValueError: there is no such mode.
    """
    name, plus, feature = mode.partition("+")
    if feature not in FEATURES or (plus and not feature):
        known = ", ".join(f"+{one}" for one in FEATURES if one)
        raise ValueError(f"mode {mode!r}: only {known} can be added to a mode")
    lossless = name == LOSSLESS
    schedule = Schedule.parse("vanilla" if lossless else name)
    return {"mode": schedule.name, "lossless": lossless, "audio_rows": FEATURES[feature]}


def needs_engine(mode: str) -> bool:
    """Whether ``generate()`` does not have a mode."""
    fields = mode_fields(mode)
    return bool(fields["lossless"]) or fields["audio_rows"] != "off"


def modes_for(num_heads: int, modes: Sequence[str]) -> list[str]:
    """Those of the modes that a model with so many heads can run as intended; see ``schedules_for``."""
    schedules = {mode: mode_fields(mode)["mode"] for mode in modes}
    fitting = schedules_for(num_heads, list(dict.fromkeys(schedules.values())))
    kept = [
        mode for mode in modes if schedules[mode] in fitting and (num_heads or not mode.startswith(LOSSLESS))
    ]
    return [*kept, *(one for one in fitting if one not in schedules.values())]
