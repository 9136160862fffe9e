"""Turn a public test set into the file that its benchmark reads.

    python tools/prepare_benchmark.py --list
    python tools/prepare_benchmark.py llama-questions COPY_OF_THE_REPOSITORY --root ROOT_PATH
    python tools/prepare_benchmark.py seed-tts-zh seedtts_testset.tar --root ROOT_PATH

NAME is a benchmark of the paper (configs/benchmarks/), or of --benchmarks; SOURCE is what its publisher offers. A set
is prepared whole or not at all. Its checksum is printed, kept in FILE.prepared.json, and stands in every result.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from vita_audio.cli.arguments import command_parser
from vita_audio.distributed import is_first
from vita_audio.evaluation.benchmarks import Benchmark, published_benchmarks, read_benchmarks
from vita_audio.evaluation.preparation import prepare_benchmark


def main(argv: Sequence[str] | None = None) -> None:
    """Prepare one benchmark.

    Raises:
        ValueError: there is no such benchmark, or SOURCE does not hold it whole.
        OSError: the disk failed.
    """
    parser = command_parser(__doc__)
    parser.add_argument("name", metavar="NAME", nargs="?", help="a benchmark")
    parser.add_argument("source", metavar="SOURCE", nargs="?", type=Path, help="what the publisher offers")
    parser.add_argument("--list", action="store_true", help="show all benchmarks, with what SOURCE must hold")
    parser.add_argument("--root", type=Path, metavar="DIR", help="the file goes below it ($ROOT_PATH)")
    parser.add_argument(
        "--benchmarks", type=Path, metavar="YAML", help="a file of your own (default: the paper's)"
    )
    parser.add_argument("--num_workers", type=int, default=1, metavar="N", help="processes (default: 1)")
    args = parser.parse_args(argv)
    known = published_benchmarks() if args.benchmarks is None else read_benchmarks(args.benchmarks)
    if args.list:
        print(listing(known.values()))
        return
    if None in (args.name, args.source, args.root):
        parser.error("give NAME, SOURCE and --root, or --list")
    if args.name not in known:
        raise ValueError(f"{args.name}: no such benchmark; known: {', '.join(known)}")
    facts = prepare_benchmark(known[args.name], args.source, args.root, args.num_workers)
    if is_first():
        print(f"{args.root / known[args.name].file}: {facts['items']} items, checksum {facts['checksum']}")


def listing(benchmarks: Iterable[Benchmark]) -> str:
    """All benchmarks, with what SOURCE must hold."""
    return "\n".join(
        f"{one.name}\n  SOURCE   {one.prepare.get('source', 'not prepared by this command')}\n"
        f"  from     {one.prepare.get('page', '')}\n  writes   {one.file}"
        for one in benchmarks
    )
