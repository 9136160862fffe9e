"""Turn a public corpus, or a folder of your own recordings, into the JSON lines that training reads.

    python tools/prepare_data.py --list
    python tools/prepare_data.py librispeech COPY_OF_THE_REPOSITORY --root ROOT
    python tools/prepare_data.py folder RECORDINGS --root ROOT --name own --test_every 6
    torchrun --nnodes 2 --nproc_per_node 8 … tools/prepare_data.py emilia COPY --root ROOT

NAME is a set of the published mix or its alias; SOURCE is what its publisher offers. The files that
configs/sts_finetune_stage1.yaml names are written below ROOT, each with NAME.rejected.jsonl (every rejected
utterance and the reason) and NAME.report.json (counts, hours, histograms). A killed run is started again with the same
command and gives the same files. docs/corpora.md has a table of all sets.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from vita_audio.cli.arguments import OptionGroup, command_parser, transcriber_group
from vita_audio.corpora import (
    FOLDERS,
    Checks,
    Cleaning,
    Settings,
    Tally,
    TestSetIndex,
    find_recipe,
    form_of,
    prepare,
    read_recipes,
)
from vita_audio.corpora.cleaning import Recogniser
from vita_audio.corpora.normalisers import NORMALISERS
from vita_audio.corpora.own import own_recipe, write_mix
from vita_audio.corpora.recipes import TASKS, Recipe
from vita_audio.corpora.text import LANGUAGES
from vita_audio.distributed import is_first

if TYPE_CHECKING:
    from vita_audio.evaluation.transcribers import Transcriber, TranscriberConfig

logger = logging.getLogger("prepare_data")

CLEANING = OptionGroup("limits", Cleaning)
OWN = "folder"


def main(argv: Sequence[str] | None = None) -> None:
    """Prepare one set.

    Raises:
        ValueError: there is no such set, SOURCE does not hold it, or an option cannot be used. Bad utterances are
            counted.
        OSError: the disk failed.
    """
    options = parse_options(argv)
    if options.list:
        print(listing(list(read_recipes().values())))
        return
    source, root = Path(options.source), Path(options.root)
    if options.name == OWN:
        form = form_of(source) if options.form == "auto" else options.form
        languages = (options.language,) if options.language in LANGUAGES else ()
        recipe = own_recipe(
            options.folder_name, form, languages, tuple(options.tasks or TASKS), options.test_every
        )
    else:
        recipe = find_recipe(options.name, read_recipes())
    tasks = () if options.name == OWN else tuple(options.tasks)
    settings = Settings(
        tasks, tuple(options.normalise), options.clips, options.num_workers, CLEANING.read(options)
    )
    tallies = prepare(recipe, source, root, settings, checks_of(options))
    if is_first():
        print(summary(tallies))
        if options.name == OWN:
            print(f"wrote {write_mix(root, recipe)}; look at it with tools/inspect_data.py")


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument("name", metavar="NAME", nargs="?", help=f"a set, its alias, or {OWN}")
    parser.add_argument("source", metavar="SOURCE", nargs="?", help="folder with what the publisher offers")
    parser.add_argument("--list", action="store_true", help="show all sets, with what SOURCE must hold")
    parser.add_argument("--root", help="the data root: outputs go below it")
    parser.add_argument(
        "--tasks", nargs="+", choices=TASKS, default=[],
        help="samples that an utterance becomes (default: as the published mix most likely uses the set)",
    )  # fmt: skip
    parser.add_argument(
        "--normalise", nargs="+", choices=sorted(NORMALISERS), default=[], metavar="NAME",
        help=f"text normalisers after those of the recipe: {', '.join(sorted(NORMALISERS))} (docs/corpora.md)",
    )  # fmt: skip
    parser.add_argument(
        "--clips", choices=("tar", "files", "stay"), default="tar",
        help="clips of compressed archives, Parquet files and long recordings go into one tar archive per unit, or "
        "into single files; stay: those of Parquet files stay in them (default: tar)",
    )  # fmt: skip
    parser.add_argument("--num_workers", type=int, default=1, help="processes (default: 1)")
    parser.add_argument(
        "--test_sets", nargs="+", metavar="FILE", default=[],
        help="reject their sentences and recordings (default: no check; tools/check_overlap.py checks a whole mix)",
    )  # fmt: skip
    parser.add_argument(
        "--agree", action="store_true", help="reject what the recogniser below hears differently"
    )
    CLEANING.add_to(parser)
    transcriber_group().add_to(parser)
    own = parser.add_argument_group(OWN)
    own.add_argument(
        "--name",
        dest="folder_name",
        default="own",
        metavar="FOLDER",
        help="of the outputs below ROOT (default: own)",
    )
    own.add_argument(
        "--form", choices=("auto", *FOLDERS), default="auto", help="of the folder (default: auto)"
    )
    own.add_argument(
        "--test_every", type=int, default=0, help="keep every so many-th clip for the test (default: 0)"
    )
    options = parser.parse_args(argv)
    if not options.list and None in (options.name, options.source, options.root):
        parser.error("give NAME, SOURCE and --root, or --list")
    if options.test_every < 0 or options.num_workers < 1:
        parser.error("test_every must be at least 0, num_workers at least 1")
    return options


def listing(recipes: Sequence[Recipe]) -> str:
    """All sets, with what SOURCE must hold."""
    blocks = [
        f"{recipe.name} ({recipe.alias})\n"
        f"  SOURCE   {recipe.source}\n"
        f"  from     {recipe.page}\n"
        f"  size     {recipe.size}; licence {recipe.license}\n"
        f"  writes   {len(recipe.outputs)} {'file' if len(recipe.outputs) == 1 else 'files'}, {recipe.outputs[0]}"
        f"{' …' if len(recipe.outputs) > 1 else ''}"
        for recipe in recipes
    ]
    return "\n".join(blocks)


def summary(tallies: dict[str, Tally]) -> str:
    """One line per output: samples, hours, rejections by reason."""
    lines = []
    for output, tally in tallies.items():
        rejected = ", ".join(f"{reason} {count}" for reason, count in tally.rejected.most_common()) or "none"
        lines.append(
            f"{output}: {tally.samples:,} samples of {tally.read:,} items, {tally.seconds / 3600:,.2f} hours; "
            f"rejected: {rejected}"
        )
    return "\n".join(lines)


def checks_of(options: argparse.Namespace, name: str = "") -> Checks:
    """The checks of ``--test_sets`` and ``--agree``; ``name`` identifies what else decides the result."""
    held_out = TestSetIndex.of(options.test_sets, options.root) if options.test_sets else None
    names = [name] if name else []
    names += [held_out.fingerprint] if held_out is not None else []
    recogniser = None
    if options.agree:
        config = transcriber_group().read(options)
        config.check()
        recogniser = OpenRecogniser(config)
        names.append(config.fingerprint())
    return Checks(held_out, recogniser, " ".join(names))


@dataclass(frozen=True)
class OpenRecogniser:
    """Opens a recogniser of the evaluation; small, so that each worker can open its own."""

    config: TranscriberConfig

    def __call__(self) -> Recogniser:
        return Agreement(self.config.open())


@dataclass(frozen=True)
class Agreement:
    """Compares a clip with its text by a recogniser's transcript; Chinese per character."""

    transcriber: Transcriber

    def __call__(self, waveform: Tensor, rate: int, text: str) -> tuple[float, str]:
        from vita_audio.evaluation.metrics import word_error_rate

        heard = self.transcriber.transcribe(waveform, rate)
        counts = word_error_rate(text, heard)
        return counts.errors / max(1, counts.reference_tokens), heard
