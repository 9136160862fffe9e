"""The recipes of ``configs/corpora/*.yaml``: which files of a publisher become which files of the mix.

A recipe is named after its set in the published mix. Its keys:

=================  ============================================================================================
alias              a short name for the command line
page, license,     for the table of docs/corpora.md and ``--list``
size, source       ``source`` says what SOURCE must hold
folder             folder of the outputs below the data root
files              output: pattern of its files below SOURCE, a list of patterns, or ``{from: pattern, …}`` with
                   any key below for this output only; a list of such mappings gives alternatives, of which
                   the first that SOURCE holds is used
layout             how the files are read (:data:`vita_audio.corpora.layouts.LAYOUTS`); its options are further keys
language           ``en``, ``zh`` or a list: the language check
tasks              ``asr``, ``tts``, ``clone``: the samples that an utterance becomes
normalise          names of :data:`vita_audio.corpora.normalisers.NORMALISERS`, in order
=================  ============================================================================================

A pattern may hold ``*``, ``?``, ``[…]`` and ``**``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vita_audio.corpora.normalisers import NORMALISERS
from vita_audio.corpora.text import LANGUAGES
from vita_audio.strict_yaml import load_yaml

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "corpora"
TASKS = ("asr", "tts", "clone")
_ABOUT = ("alias", "page", "license", "size", "source")
_COMMON = ("layout", "language", "tasks", "normalise")


class RecipeError(ValueError):
    """A recipe that does not exist or cannot be used. The message names the file, the set and the field."""


@dataclass(frozen=True)
class Part:
    """One output of a recipe.

    Attributes:
        output: path below the data root.
        patterns: its files below SOURCE.
        layout: how they are read.
        languages: of the texts; empty: any.
        tasks: samples that an utterance becomes.
        normalise: names of text normalisers.
        options: of the layout.
    """

    output: str
    patterns: tuple[str, ...]
    layout: str
    languages: tuple[str, ...]
    tasks: tuple[str, ...]
    normalise: tuple[str, ...]
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Recipe:
    """A set of the mix. The attributes are the keys in the module's docstring; ``parts`` are its ``files``.

    Parts with the same output are alternatives.
    """

    name: str
    alias: str
    page: str
    license: str
    size: str
    source: str
    parts: tuple[Part, ...]

    @property
    def outputs(self) -> list[str]:
        """The files that it writes, below the data root."""
        return list(dict.fromkeys(part.output for part in self.parts))


def read_recipes(folder: Path = FOLDER) -> dict[str, Recipe]:
    """All recipes by name, in the order of the files.

    Raises:
        RecipeError: a file cannot be read, or a recipe is invalid.
    """
    recipes: dict[str, Recipe] = {}
    for file in sorted(folder.glob("*.yaml")):
        try:
            content = load_yaml(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise RecipeError(f"{file}: cannot be read: {' '.join(str(error).split())}") from error
        if not isinstance(content, Mapping):
            raise RecipeError(f"{file}: must map names of sets to recipes")
        for name, entry in content.items():
            if name in recipes:
                raise RecipeError(f"{file}: {name}: another file has a recipe of this name")
            recipes[name] = _read_recipe(f"{file}: {name}", name, entry)
    if not recipes:
        raise RecipeError(f"{folder}: holds no recipes (*.yaml)")
    return recipes


def find_recipe(name: str, recipes: Mapping[str, Recipe]) -> Recipe:
    """A recipe by its name or alias.

    Raises:
        RecipeError: there is none.
    """
    for recipe in recipes.values():
        if name in (recipe.name, recipe.alias):
            return recipe
    raise RecipeError(f"{name}: no such set; --list shows all")


def _read_recipe(where: str, name: str, entry: Any) -> Recipe:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("files"), Mapping) or not entry["files"]:
        raise RecipeError(f"{where}: needs 'files', a mapping of outputs to patterns")
    missing = [key for key in _ABOUT if not isinstance(entry.get(key), str)]
    if missing:
        raise RecipeError(f"{where}: needs a text for {', '.join(missing)}")
    shared = {
        key: value for key, value in entry.items() if key not in _ABOUT and key not in ("folder", "files")
    }
    folder = entry.get("folder", "")
    parts = tuple(
        _read_part(f"{where}: {output}", f"{folder}/{output}".lstrip("/"), value, shared)
        for output, values in entry["files"].items()
        for value in (values if isinstance(values, list) and isinstance(values[0], Mapping) else [values])
    )
    return Recipe(name=name, parts=parts, **{key: entry[key] for key in _ABOUT})


def _read_part(where: str, output: str, value: Any, shared: Mapping[str, Any]) -> Part:
    own = dict(value) if isinstance(value, Mapping) else {"from": value}
    patterns = own.pop("from", None)
    patterns = [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(patterns, list) or not patterns or not all(isinstance(one, str) for one in patterns):
        raise RecipeError(f"{where}: needs a pattern or a list of patterns (from)")
    settings = {**shared, **own}
    layout = settings.get("layout")
    if not isinstance(layout, str):
        raise RecipeError(f"{where}: needs a layout")
    return Part(
        output,
        tuple(patterns),
        layout,
        _names(where, "language", settings.get("language"), LANGUAGES),
        _names(where, "tasks", settings.get("tasks"), TASKS),
        _names(where, "normalise", settings.get("normalise"), tuple(NORMALISERS)),
        {key: value for key, value in settings.items() if key not in _COMMON},
    )


def _names(where: str, field: str, value: Any, known: tuple[str, ...]) -> tuple[str, ...]:
    names = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(names, list) or any(name not in known for name in names):
        raise RecipeError(f"{where}: {field!r} must be of {', '.join(known)}; it is {value!r}")
    return tuple(names)
