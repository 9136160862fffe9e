"""A class that is loaded when it is first used behaves like the class."""

from __future__ import annotations

import fractions
import sys

from vita_audio.lazy import LazyClass, when_imported


def test_a_lazy_class_creates_objects_and_can_be_a_base():
    lazy = LazyClass("fractions", "Fraction", known=7)
    assert lazy.known == 7
    assert lazy(1, 2) == fractions.Fraction(1, 2)
    assert lazy.__name__ == "Fraction"
    assert isinstance(fractions.Fraction(1), lazy)
    assert not isinstance(1, lazy)
    assert issubclass(fractions.Fraction, lazy)

    class Half(lazy):
        pass

    assert Half.__mro__[1] is fractions.Fraction


def test_an_action_waits_for_the_import_and_runs_once(monkeypatch):
    for name in ("this", "antigravity"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    seen = []
    when_imported("this", seen.append)
    assert seen == []
    import this

    assert seen == [this]
    when_imported("this", seen.append)
    assert seen == [this, this]
