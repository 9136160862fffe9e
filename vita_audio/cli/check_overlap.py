"""Prove that a mix holds no sentence and no recording of the test sets.

    python tools/check_overlap.py configs/sts_finetune_stage1.yaml --data_root ROOT --test_sets TEST.jsonl …

Every sample of every file of the mix is compared, also of files with ratio 0: sentences by their letters and digits,
recordings by their decoded samples. Only recordings as long as one of a test set are decoded, so a large mix costs
little more than reading its headers; ``--no_audio`` skips even these. The command prints every sample in common and
ends with status 1 if there is one. ``tools/prepare_data.py --test_sets`` keeps such samples out in the first place.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from vita_audio.chat import Sample, SampleError, locate, parse_sample
from vita_audio.cli.arguments import command_parser
from vita_audio.corpora import TestSetIndex
from vita_audio.data.mixing import SourceSpec, read_mix
from vita_audio.data.sources import MissingSource, Rows

_SHOWN = 100


def main(argv: Sequence[str] | None = None) -> None:
    """Compare a mix with test sets.

    Raises:
        SystemExit: they have something in common.
        ValueError: the mix or a test set cannot be used.
    """
    options = parse_options(argv)
    specs = read_mix(options.config, options.data_root)
    index = TestSetIndex.of(options.test_sets, options.data_root)
    found = compared = 0
    for spec, row, sample in _samples(specs, options.data_root or Path(options.config).parent):
        compared += 1
        for what, place in index.overlaps(sample, audio=options.audio):
            found += 1
            if found <= _SHOWN:
                print(f"{spec.path}, row {row}: {what[:100]!r} is also in {place}")
    known = (
        f"{len(index.sentences):,} sentences and {index.num_recordings:,} recordings of "
        f"{len(options.test_sets)} test sets"
    )
    if found:
        sys.exit(
            f"{found:,} overlaps of {compared:,} samples with {known}; remove these samples from the mix"
        )
    print(f"no overlap: {compared:,} samples compared with {known}")


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument("config", help="YAML of the data mix")
    parser.add_argument(
        "--test_sets", nargs="+", required=True, metavar="FILE", help="test sets, as JSON lines"
    )
    parser.add_argument(
        "--data_root",
        help="base folder of relative paths (default: $ROOT_PATH, else the folder of each file)",
    )
    parser.add_argument("--no_audio", dest="audio", action="store_false", help="compare sentences only")
    return parser.parse_args(argv)


def _samples(specs: list[SourceSpec], data_root: str | Path) -> Iterator[tuple[SourceSpec, int, Sample]]:
    """Every usable sample of every file, once."""
    for path, spec in {spec.path: spec for spec in specs}.items():
        try:
            rows = Rows(path)
        except MissingSource as error:
            tqdm.write(f"left out: {error}", file=sys.stderr)
            continue
        for row in tqdm(range(len(rows)), desc=path.stem, unit="row", leave=False):
            try:
                yield spec, row, locate(parse_sample(rows[row]), data_root, path.parent)
            except SampleError:
                continue  # training refuses it too, and counts it
