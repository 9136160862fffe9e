"""A class that is loaded when it is first used, for registries that want it at once."""

from __future__ import annotations

from importlib import import_module
from typing import Any


class LazyClass:
    """Stands for a class of a module that takes long to import.

    Args:
        module: the class's home.
        name: of the class.
        known: attributes that are asked for before the class is needed.
    """

    def __init__(self, module: str, name: str, **known: Any) -> None:
        self._home = module, name
        self.__dict__.update(known)

    def __getattr__(self, attribute: str) -> Any:
        module, name = self.__dict__["_home"]
        return getattr(getattr(import_module(module), name), attribute)
