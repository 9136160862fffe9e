"""Lazy registration with libraries whose modules are slow to import: nothing is loaded before it is used."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any


class LazyClass:
    """A proxy for a class whose module is slow to import. The module is loaded on first use.

    Args:
        module: the module that defines the class.
        name: name of the class.
        known: attributes that are read before the class is needed.
    """

    def __init__(self, module: str, name: str, **known: Any) -> None:
        self._home = module, name
        self.__dict__.update(known)

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._load(), attribute)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._load()(*args, **kwargs)

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        return (self._load(),)

    def __instancecheck__(self, instance: object) -> bool:
        return isinstance(instance, self._load())

    def __subclasscheck__(self, subclass: type) -> bool:
        return issubclass(subclass, self._load())

    def _load(self) -> type:
        module, name = self.__dict__["_home"]
        loaded: type = getattr(import_module(module), name)
        return loaded


def when_imported(module: str, action: Callable[[ModuleType], None]) -> None:
    """Call ``action`` with a module as soon as it is imported, or at once if it already was."""
    if module in sys.modules:
        action(sys.modules[module])
    else:
        sys.meta_path.insert(0, _Watch(module, action))


class _Watch(MetaPathFinder):
    """Finds one module, once, through the other finders, and calls an action after it has run."""

    def __init__(self, module: str, action: Callable[[ModuleType], None]) -> None:
        self._module = module
        self._action = action

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._module:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_act(module: ModuleType) -> None:
                run(module)
                self._action(module)

            spec.loader.exec_module = run_and_act  # type: ignore[method-assign]  # this loader alone
        return spec
