"""A recipe's outputs, unit by unit: parallel, restartable, and the same bytes however often it was interrupted.

Units are divided among the processes of a launch (torchrun) and the workers of each. A unit's lines, rejections and
counts go into a work folder, the counts last; a unit with counts is done. When all units of an output are done, the
first process joins them in their order:

=========================  ====================================================================================
NAME.jsonl                 the samples
NAME.rejected.jsonl        every rejected item: unit, id, reason, message
NAME.report.json           counts, hours, histograms before and after the checks, the recipe and the settings
=========================  ====================================================================================
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vita_audio import distributed
from vita_audio.chat import locate_file
from vita_audio.corpora.cleaning import Cleaning, Recogniser, Rejection, Tally
from vita_audio.corpora.clips import ClipStore
from vita_audio.corpora.hygiene import TestSetIndex
from vita_audio.corpora.items import Rejected
from vita_audio.corpora.layouts import Layout, SourceError, open_layout
from vita_audio.corpora.recipes import Part, Recipe
from vita_audio.corpora.samples import Builder
from vita_audio.files import read_json, whole_file, write_json

logger = logging.getLogger(__name__)

_VERSION = 1
"""Part of every fingerprint: raised when the same input gives other samples."""
_WORK = ".prepare"
_LONGEST_MESSAGE = 500


@dataclass(frozen=True)
class Settings:
    """How a recipe is prepared.

    Attributes:
        tasks: samples that an utterance becomes; empty: those of the recipe.
        normalise: names of text normalisers, after those of the recipe.
        clips: clips that cannot stay where they are go into one ``tar`` per unit, or into ``files``; with ``stay``
            those in Parquet files stay there too, and others go into ``tar``.
        num_workers: processes on this machine; with torchrun, per process of the launch.
    """

    tasks: tuple[str, ...] = ()
    normalise: tuple[str, ...] = ()
    clips: str = "tar"
    num_workers: int = 1
    cleaning: Cleaning = field(default_factory=Cleaning)


@dataclass(frozen=True)
class Checks:
    """Checks that need more than an item; both must be picklable.

    Attributes:
        held_out: test sets whose sentences and recordings are rejected.
        recogniser: opens the recogniser, in each worker.
        name: identifies both, for the fingerprint.
    """

    held_out: TestSetIndex | None = None
    recogniser: Callable[[], Recogniser] | None = None
    name: str = ""


@dataclass(frozen=True)
class _Job:
    part: Part
    layout: Layout
    unit: Path
    source: Path
    root: Path
    stem: Path  # of the unit's files in the work folder
    output: Path
    clips: str  # folder of its clips below the root
    settings: Settings
    checks: Checks
    fingerprint: str


def prepare(
    recipe: Recipe,
    source: Path,
    root: Path,
    settings: Settings,
    checks: Checks | None = None,
    layout: Layout | None = None,
) -> dict[str, Tally]:
    """Write the outputs of a recipe for which SOURCE holds files.

    Args:
        source: what the publisher offers.
        root: the data root.
        layout: reads all outputs, instead of the recipe's layouts; ``checks.name`` must identify it.

    Returns:
        Counts by output.

    Raises:
        SourceError: SOURCE holds nothing of the set, or lacks what a layout needs.
        OSError: the disk failed.
    """
    if not source.is_dir():
        raise SourceError(f"{source}: no such folder; it must hold {recipe.source}")
    tallies: dict[str, Tally] = {}
    for part in recipe.parts:
        if part.output in tallies:  # another alternative was there
            continue
        part = replace(
            part,
            tasks=part.tasks and (settings.tasks or part.tasks),
            normalise=part.normalise + settings.normalise,
        )
        opened = layout or open_layout(part.layout, dict(part.options), f"{recipe.name}: {part.output}")
        tally = _prepare_part(recipe.name, part, opened, source, root, settings, checks or Checks())
        if tally is not None:
            tallies[part.output] = tally
    if not tallies:
        wanted = ", ".join(pattern for part in recipe.parts[:3] for pattern in part.patterns)
        raise SourceError(
            f"{source}: holds nothing of {recipe.name}; it must hold {recipe.source} ({wanted}, …)"
        )
    for output in recipe.outputs:
        if output not in tallies:
            patterns = [one for part in recipe.parts if part.output == output for one in part.patterns]
            logger.warning("%s: %s has nothing like %s", output, source, " or ".join(patterns))
    return tallies


def _prepare_part(
    recipe: str, part: Part, layout: Layout, source: Path, root: Path, settings: Settings, checks: Checks
) -> Tally | None:
    """Counts of an output; None if SOURCE has no files for it."""
    output = Path(locate_file(part.output, root, root))
    about = {
        "version": _VERSION,
        "recipe": recipe,
        "part": asdict(part),
        "clips": settings.clips,
        "cleaning": asdict(settings.cleaning),
        "checks": checks.name,
    }
    work = root / _WORK / f"{part.output.replace('/', '--')}-{_digest([about, str(source)])}"
    with distributed.agreed(SourceError, OSError):
        units = layout.units(source, part.patterns, work) if distributed.is_first() else []
    distributed.barrier()
    units = units or layout.units(source, part.patterns, work)
    if not units:
        return None
    jobs = []
    for unit, name in zip(units, _names(units), strict=True):
        digest = _digest([about, name, _identity(unit, work)])
        clips = f"{_clip_folder(part.output)}/{name}"
        jobs.append(
            _Job(part, layout, unit, source, root, work / name, output, clips, settings, checks, digest)
        )
    whole = _digest([job.fingerprint for job in jobs])
    report = _sidecar(output, "report.json")
    done = _done(report, output, whole)
    if done is None:
        mine = jobs[distributed.rank() :: distributed.world_size()]
        _run(mine, part.output, settings.num_workers)
        distributed.barrier()
        if distributed.is_first():
            _join(jobs, output, {**about, "fingerprint": whole})
        distributed.barrier()
        done = _done(report, output, whole)
    if distributed.is_first():
        shutil.rmtree(work, ignore_errors=True)
    assert done is not None
    return done


def _run(jobs: Sequence[_Job], name: str, workers: int) -> None:
    todo = [job for job in jobs if _unit_tally(job) is None]
    started, seconds = time.monotonic(), 0.0
    with tqdm(
        total=len(jobs),
        initial=len(jobs) - len(todo),
        unit="unit",
        desc=Path(name).stem,
        disable=not distributed.is_first(),
    ) as progress:
        for tally in _tallies(todo, workers):
            seconds += tally.seconds
            speed = seconds / 3600 / max(1e-9, time.monotonic() - started)
            progress.set_postfix_str(f"{speed:.4f} h/s")
            progress.update()


def _tallies(jobs: Sequence[_Job], workers: int) -> Iterator[Tally]:
    if workers <= 1 or len(jobs) <= 1:
        yield from map(prepare_unit, jobs)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context) as pool:
        yield from pool.map(prepare_unit, jobs)


def prepare_unit(job: _Job) -> Tally:
    """Read a unit, and write its lines, rejections and, last, its counts."""
    with (
        whole_file(job.stem.with_name(job.stem.name + ".jsonl")) as lines,
        whole_file(job.stem.with_name(job.stem.name + ".rejected.jsonl")) as rejections,
        lines.open("w", encoding="utf-8") as samples,
        rejections.open("w", encoding="utf-8") as rejected,
        ClipStore(job.root, job.output, job.clips, job.settings.clips) as store,
    ):
        recogniser = job.checks.recogniser() if job.checks.recogniser is not None else None
        builder = Builder(job.part, job.settings.cleaning, store, job.checks.held_out, recogniser)

        def reject(id_: str, reason: str, message: str) -> None:
            said = " ".join(message.split())[:_LONGEST_MESSAGE]
            entry = {"unit": job.unit.name, "id": id_, "reason": reason, "message": said}
            rejected.write(_line(entry))

        try:
            for item in job.layout.read(job.unit, job.source):
                try:
                    built = builder.build(item)
                except Rejected as error:
                    reject(item.id, error.reason, str(error))
                else:
                    samples.writelines(map(_line, built))
        except SourceError as error:  # the rest of a damaged unit
            builder.tally.rejected[Rejection.DAMAGED_FILE.value] += 1
            builder.tally.read += 1
            reject("", Rejection.DAMAGED_FILE.value, str(error))
    write_json(_tally_file(job), {"fingerprint": job.fingerprint, **builder.tally.to_dict()})
    return builder.tally


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace").decode() + "\n"


def _tally_file(job: _Job) -> Path:
    return job.stem.with_name(job.stem.name + ".json")


def _unit_tally(job: _Job) -> Tally | None:
    """Counts of a unit that is done with these settings."""
    try:
        content = read_json(_tally_file(job))
        return Tally.from_dict(content) if content["fingerprint"] == job.fingerprint else None
    except (OSError, ValueError, KeyError):
        return None


def _done(report: Path, output: Path, fingerprint: str) -> Tally | None:
    try:
        content = read_json(report)
        return (
            Tally.from_dict(content) if content["fingerprint"] == fingerprint and output.is_file() else None
        )
    except (OSError, ValueError, KeyError):
        return None


def _join(jobs: Sequence[_Job], output: Path, about: dict[str, Any]) -> None:
    clips = Path(locate_file(_clip_folder(jobs[0].part.output), jobs[0].root, jobs[0].root))
    for part in clips.glob(".*.tmp"):  # of units that were killed
        part.unlink()
    total = Tally()
    for job in jobs:
        tally = _unit_tally(job)
        assert tally is not None, job.unit
        total.add(tally)
    for suffix, target in ((".jsonl", output), (".rejected.jsonl", _sidecar(output, "rejected.jsonl"))):
        with whole_file(target) as temporary, temporary.open("wb") as joined:
            for job in jobs:
                with job.stem.with_name(job.stem.name + suffix).open("rb") as unit:
                    shutil.copyfileobj(unit, joined)
    write_json(_sidecar(output, "report.json"), {**about, "units": len(jobs), **total.to_dict()})


def _sidecar(output: Path, kind: str) -> Path:
    return output.with_name(f"{output.name.removesuffix('.jsonl')}.{kind}")


def _clip_folder(output: str) -> str:
    """Folder of an output's clips below the root: next to ``jsonl/``, or next to the output."""
    bare = output.removesuffix(".jsonl")
    if bare.startswith("datasets/jsonl/"):
        return bare.replace("jsonl/", "clips/", 1)
    folder, _, name = bare.rpartition("/")
    return f"{folder}/clips/{name}".lstrip("/")


def _identity(unit: Path, work: Path) -> str | int:
    """What changes with a unit's content: the size of an archive, all of an index file."""
    if unit.is_relative_to(work):
        return hashlib.sha256(unit.read_bytes()).hexdigest()
    return unit.stat().st_size if unit.exists() else "a link to nothing"


def _names(units: Sequence[Path]) -> list[str]:
    """Names of the units' files: a number for their order, and the unit's own name."""
    return [f"{number:05d}-{unit.name.split('.')[0]}"[:100] for number, unit in enumerate(units)]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
