"""A folder of one's own recordings as a recipe: recognition, synthesis and voice cloning, with a test set apart."""

from __future__ import annotations

from pathlib import Path

from vita_audio.corpora.recipes import Part, Recipe
from vita_audio.files import write_text

_MIX = """# Written by tools/prepare_data.py folder. Add data of other tasks before training: see docs/your_own_data.md.
dataset:
  {name}:
    data_paths: [{paths}]
"""


def own_recipe(
    name: str, form: str, languages: tuple[str, ...], tasks: tuple[str, ...], test_every: int
) -> Recipe:
    """The recipe of a folder.

    Args:
        name: folder of the outputs below the data root.
        form: one of :data:`vita_audio.corpora.folders.FOLDERS`.
        tasks: an output for each.
        test_every: every so many-th clip is kept for ``NAME/TASK_test.jsonl``, of recognition and synthesis; 0: none.
    """

    def part(task: str, test: bool) -> Part:
        options = {"every": test_every, "test": test, "speaker": name}
        output = f"{name}/{task}{'_test' if test else ''}.jsonl"
        return Part(output, (".",), form, languages, (task,), (), options)

    parts = [part(task, False) for task in tasks]
    if test_every:
        parts += [part(task, True) for task in tasks if task != "clone"]
    source = f"recordings with transcripts, as {form}"
    return Recipe(name, name, "", "your own", "", source, tuple(parts))


def write_mix(root: Path, recipe: Recipe) -> Path:
    """Write the mix of the training outputs, ``NAME/mix.yaml``."""
    paths = [part.output for part in recipe.parts if not part.options["test"]]
    path = root / recipe.name / "mix.yaml"
    write_text(path, _MIX.format(name=recipe.name, paths=", ".join(paths)))
    return path
