"""Public corpora -> JSON lines: one recipe for each set of the published mix, and for folders of recordings."""

from vita_audio.corpora.cleaning import Cleaning, Rejection, Tally
from vita_audio.corpora.folders import FOLDERS, form_of
from vita_audio.corpora.hygiene import TestSetIndex
from vita_audio.corpora.layouts import SourceError
from vita_audio.corpora.prepare import Checks, Settings, prepare
from vita_audio.corpora.recipes import Part, Recipe, RecipeError, find_recipe, read_recipes

__all__ = [
    "FOLDERS",
    "Checks",
    "Cleaning",
    "Part",
    "Recipe",
    "RecipeError",
    "Rejection",
    "Settings",
    "SourceError",
    "Tally",
    "TestSetIndex",
    "find_recipe",
    "form_of",
    "prepare",
    "read_recipes",
]
