"""Command-line options, generated from the dataclasses that hold their defaults.

    parser = command_parser(__doc__)
    GENERATION.add_to(parser)
    args = parser.parse_args(argv)
    options = GENERATION.read(args)          # a GenerationOptions

Every field of a dataclass becomes a flag of the same name, and the ``Attributes:`` section of its docstring becomes
the help. An option thus has one name, one default and one description. Flags use snake case; dashes are
also accepted.
"""

from __future__ import annotations

import argparse
import inspect
import logging
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar

from vita_audio.audio import available_kinds
from vita_audio.chat.prompts import SYSTEM_PROMPTS
from vita_audio.cli.launch import LAUNCHER_VARIABLE, refuse
from vita_audio.inference.options import AUTO_SYSTEM, CodecOptions, GenerationOptions, RuntimeOptions

if TYPE_CHECKING:
    from vita_audio.evaluation.transcribers import TranscriberConfig

Options = TypeVar("Options")

TRACEBACK_VARIABLE = "VITA_AUDIO_TRACEBACK"
"""Environment variable: if set, errors keep their traceback."""


def command_parser(description: str | None, **settings: Any) -> CommandParser:
    """A parser that shows a module's docstring unchanged and reports errors in one line."""
    return CommandParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        **settings,
    )


class CommandParser(argparse.ArgumentParser):
    """Accepts ``--max-new-tokens`` for ``--max_new_tokens``; errors are one line without the list of flags."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = list(sys.argv[1:] if args is None else map(str, args))
        end = words.index("--") if "--" in words else len(words)
        words[:end] = map(self._snake_case, words[:end])
        return super().parse_known_args(words, namespace)

    def _snake_case(self, word: str) -> str:
        flag, separator, value = word.partition("=")
        if not flag.startswith("--") or flag in self._option_string_actions:
            return word
        return f"--{flag[2:].replace('-', '_')}{separator}{value}"

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; {self.prog} --help lists the options\n")


@dataclass(frozen=True)
class OptionGroup(Generic[Options]):
    """The flags of one dataclass.

    Attributes:
        title: title of the group in ``--help``.
        holder: the dataclass. Its fields are ``str``, ``int``, ``float``, ``bool``, ``Path``, a list of one of
            these, or one of these or None; others need ``settings``.
        names: flags of a field whose flag differs from its name or has aliases; the first is the name of the
            parsed value.
        settings: keyword arguments of ``add_argument`` for a field whose type is not sufficient.
        left_out: fields without a flag.
        unset: the meaning of None, for the help.
    """

    title: str
    holder: type[Options]
    names: Mapping[str, Sequence[str]] = field(default_factory=dict)
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    left_out: Sequence[str] = ()
    unset: str = "none"

    def add_to(self, parser: argparse.ArgumentParser, **defaults: Any) -> None:
        """Add the flags; ``defaults`` replace those of the dataclass for this command."""
        group = parser.add_argument_group(self.title)
        types_of = typing.get_type_hints(self.holder)
        texts = attribute_docs(self.holder)
        for entry in self._fields():
            default = defaults.get(entry.name, _default(entry))
            settings = dict(self.settings.get(entry.name) or _settings(types_of[entry.name]))
            if entry.name.endswith("_path"):
                settings["metavar"] = "DIR"
            shown = self.unset if default is None else _shown(default)
            text = f"{texts.get(entry.name, entry.name)} (default: {shown})".replace("%", "%%")
            flags = [f"--{name}" for name in self._names(entry)]
            group.add_argument(
                *flags, dest=self._names(entry)[0], default=default, **{"help": text} | settings
            )
            if settings.get("type") is _boolean:
                group.add_argument(
                    *(f"--no_{name}" for name in self._names(entry)),
                    dest=self._names(entry)[0], action="store_false", help=argparse.SUPPRESS, default=argparse.SUPPRESS,
                )  # fmt: skip

    def read(self, args: argparse.Namespace, **values: Any) -> Options:
        """The dataclass for the command line; ``values`` take precedence."""
        given = {entry.name: getattr(args, self._names(entry)[0]) for entry in self._fields()}
        return self.holder(**given | values)

    def _fields(self) -> list[Field[Any]]:
        return [entry for entry in fields(self.holder) if entry.name not in self.left_out]  # type: ignore[arg-type]

    def _names(self, entry: Field[Any]) -> Sequence[str]:
        return self.names.get(entry.name, (entry.name,))


class JoinWords(argparse.Action):
    """Joins the words of an option into one text."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: Any = None
    ) -> None:
        setattr(namespace, self.dest, " ".join(values))


GENERATION = OptionGroup(
    "generation",
    GenerationOptions,
    names={"mode": ("mode", "mtp_inference_mode")},
    settings={"mode": {"nargs": "+", "metavar": "MODE", "action": JoinWords}},
    unset="the checkpoint's choice",
)
CODEC = OptionGroup(
    "codec",
    CodecOptions,
    names={"frontend_path": ("frontend_path", "audio_model_name_or_path")},
    settings={"audio_tokenizer_type": {"choices": available_kinds(), "metavar": "KIND"}},
)
RUNTIME = OptionGroup(
    "runtime",
    RuntimeOptions,
    settings={"dtype": {"choices": ("auto", "float32", "bfloat16", "float16")}},
    unset="the best that this machine supports",
)


def transcriber_group() -> OptionGroup[TranscriberConfig]:
    """Flags of the recogniser. A function, because evaluation needs packages that other commands do not."""
    from vita_audio.evaluation.transcribers import TranscriberConfig

    return OptionGroup(
        "recogniser",
        TranscriberConfig,
        names={"name": ("transcriber",), "path": ("transcriber_path",)},
        settings={
            "name": {"metavar": "NAME"},
            "path": {"metavar": "DIR"},
            "grammar": {"metavar": "FILE"},
        },
        left_out=("device",),
    )


def add_system_prompt(parser: argparse.ArgumentParser) -> None:
    """``--system_prompt``; :func:`vita_audio.inference.options.system_message` reads it."""
    parser.add_argument(
        "--system_prompt", default=AUTO_SYSTEM, metavar="NAME|TEXT",
        help=f"system message of conversations that have none: {AUTO_SYSTEM} (the one that the model was trained "
        f"with), {', '.join(SYSTEM_PROMPTS)}, or the message itself (default: {AUTO_SYSTEM})",
    )  # fmt: skip


def run_command(main: Callable[[], None]) -> None:
    """Run ``main`` as a program: logs go to stderr, and bad input ends it with one line and status 1."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    with one_line_refusals():
        main()


@contextmanager
def one_line_refusals() -> Iterator[None]:
    """End the process with the first line of an input error, without a traceback.

    With the launcher, the line is passed to the launcher, which prints it once for all processes.

    Raises:
        SystemExit: with that line.
    """
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        lines = str(error).strip().splitlines()
        message = f"error: {lines[0] if lines else type(error).__name__}"
        if LAUNCHER_VARIABLE in os.environ:
            refuse(message)
        sys.exit(message)
    except KeyboardInterrupt:
        sys.exit(130)


def attribute_docs(holder: type) -> dict[str, str]:
    """The text about each name in the ``Attributes:`` section of a docstring."""
    _, _, section = (inspect.getdoc(holder) or "").partition("Attributes:\n")
    texts: dict[str, str] = {}
    names: list[str] = []
    for line in section.splitlines():
        opening = re.fullmatch(r" {4}(\w+(?:, \w+)*): (.*)", line)
        if opening:
            names = opening[1].split(", ")
            texts |= dict.fromkeys(names, opening[2])
        elif line.startswith(" " * 8):
            texts |= {name: f"{texts[name]} {line.strip()}" for name in names}
        elif line.strip():
            break
    return {name: _plain(text) for name, text in texts.items()}


def _plain(text: str) -> str:
    """The text without markup and the final full stop."""
    text = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"\1", text)
    return text.replace("``", "").removesuffix(".")


def _default(entry: Field[Any]) -> Any:
    if entry.default is not MISSING:
        return entry.default
    return None if entry.default_factory is MISSING else entry.default_factory()


def _shown(default: Any) -> str:
    return " ".join(map(str, default)) if isinstance(default, (list, tuple)) else str(default)


def _settings(kind: Any) -> dict[str, Any]:
    """The argparse converter for this type; for several types that include text, text.

    Raises:
        TypeError: the type is ambiguous; the group needs ``settings`` for it.
    """
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        kinds = [one for one in typing.get_args(kind) if one is not types.NoneType]
        if len(kinds) != 1 and str not in kinds:
            raise TypeError(f"{kind}: no single reading on a command line")
        return _settings(kinds[0] if len(kinds) == 1 else str)
    origin = typing.get_origin(kind)
    if origin in (list, tuple, Sequence):
        return {"nargs": "+", "type": typing.get_args(kind)[0]}
    if origin is typing.Literal:
        return {"choices": typing.get_args(kind)}
    if kind is bool:
        return {"nargs": "?", "const": True, "type": _boolean, "metavar": "BOOL"}
    if not isinstance(kind, type):
        raise TypeError(f"{kind}: no single reading on a command line")
    return {"type": kind, "metavar": _METAVARS.get(kind, "VALUE")}


_METAVARS: dict[type, str] = {int: "N", float: "X", str: "VALUE"}


def _boolean(text: str) -> bool:
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"{text!r}: give true or false")
    return words[text.lower()]
