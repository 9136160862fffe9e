"""Checks before the first step: the codec opens, and all ranks have the same data.

Without these checks a run would start and silently lose a source: every spoken sample of a mix whose codec
is missing, or every sample of a file that one node lacks.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vita_audio.audio import is_continuous_kind
from vita_audio.chat import Sample, SampleError, locate, parse_sample
from vita_audio.data.mixing import FileState, Mix, MixError
from vita_audio.data.speech import Part, SpeechReader, coded_audios
from vita_audio.distributed import gather_objects

_SAMPLES_LOOKED_AT = 64
"""Samples of each file, evenly spaced, that are checked for speech that needs the codec."""


def check_codec(mix: Mix, reader: SpeechReader, data_root: str | Path) -> bool:
    """Open the codec and the feature front end, if the mix contains speech that needs them.

    Returns:
        Whether some codes must be computed during training.

    Raises:
        ValueError: one of them does not open. The message names a sample that needs it and the option to set.
    """
    opened: dict[Part, bool] = {"codes": False, "features": False}
    continuous = is_continuous_kind(reader.kind)
    for source, spec in enumerate(mix.specs):
        for row, sample in _some_samples(mix, source):
            sample = locate(sample, data_root, spec.path.parent)
            coded = list(coded_audios(sample, assistant_only=continuous))
            needed: dict[Part, str | None] = {
                "codes": next((audio for audio in coded if not reader.has_codes(audio)), None),
                "features": str(sample.audios[0]) if len(coded) < len(sample.audios) else None,
            }
            for part, audio in needed.items():
                if audio is not None and not opened[part]:
                    where = f"the mix contains speech without precomputed {part} ({spec.name}, row {row}: {audio})"
                    reader.check_opens(part, where)
                    opened[part] = True
            if opened["codes"] and (opened["features"] or not continuous):
                return True
    return opened["codes"]


def _some_samples(mix: Mix, source: int) -> Iterator[tuple[int, Sample]]:
    rows = mix.rows[source]
    looked_at = min(_SAMPLES_LOOKED_AT, len(rows))
    for index in range(looked_at):
        row = index * len(rows) // looked_at
        try:
            yield row, parse_sample(rows[row])
        except SampleError:
            continue  # counted, with its reason, when the loader reads it


@dataclass(frozen=True)
class DataIdentity:
    """The state that must be equal on all ranks.

    Attributes:
        host: name of the machine.
        files: every file of the mix, in its order.
        settings: everything else that determines the rows, by name.
    """

    host: str
    files: tuple[FileState, ...]
    settings: dict[str, str]

    @classmethod
    def of(cls, mix: Mix, settings: dict[str, str]) -> DataIdentity:
        """This process's."""
        return cls(socket.gethostname(), tuple(mix.files), settings)


def check_ranks_agree(mine: DataIdentity) -> None:
    """Compare the data of all ranks. All ranks must call it.

    Raises:
        MixError: raised on every rank; the message names the rank and what it lacks.
    """
    differences = list(_differences(gather_objects(mine)))
    if differences:
        more = f" (and {len(differences) - 1} more differences)" if len(differences) > 1 else ""
        raise MixError(f"the ranks do not have the same data: {differences[0]}{more}")


def _differences(ranks: Sequence[DataIdentity]) -> Iterator[str]:
    """Messages about how ranks differ from the most complete one."""
    if len({len(one.files) for one in ranks}) > 1:
        counts = ", ".join(f"rank {rank} names {len(one.files)} files" for rank, one in enumerate(ranks))
        yield f"the mix file is not the same ({counts})"
        return
    for states in zip(*(one.files for one in ranks), strict=True):
        holder = max(range(len(states)), key=lambda rank: (states[rank].rows, -rank))
        best = states[holder]
        for rank, state in enumerate(states):
            if (state.name, state.used) != (best.name, best.used) and state.rows == best.rows:
                yield (
                    f"rank {rank} takes {state.used} samples of {state.name}, rank {holder} {best.used} of "
                    f"{best.name}; give both the same mix file"
                )
            elif state.rows == 0 < best.rows:
                yield (
                    f"rank {rank} ({ranks[rank].host}) lacks {state.path} of {state.name}, which rank {holder} "
                    f"({ranks[holder].host}) has; copy it there, or remove it from the mix"
                )
            elif state.bytes == best.bytes and state.content != best.content:
                yield (
                    f"{state.path} has another content on rank {rank} ({ranks[rank].host}) than on rank {holder} "
                    f"({ranks[holder].host}); copy one over the other"
                )
            elif (state.rows, state.bytes) != (best.rows, best.bytes):
                yield (
                    f"{state.path} has {state.rows} samples in {state.bytes} bytes on rank {rank} "
                    f"({ranks[rank].host}) and {best.rows} in {best.bytes} on rank {holder} "
                    f"({ranks[holder].host}); copy one over the other"
                )
    for rank, one in enumerate(ranks):
        for name in sorted(one.settings.keys() | ranks[0].settings.keys()):
            value, first = one.settings.get(name), ranks[0].settings.get(name)
            if value != first:
                yield f"{name} is {value} on rank {rank} ({one.host}) and {first} on rank 0 ({ranks[0].host})"
