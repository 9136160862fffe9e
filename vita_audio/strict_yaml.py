"""A stricter YAML reader: ``1e-1`` and ``010`` are numbers, and a duplicate key is an error.

PyYAML reads YAML 1.1, in which ``1e-1`` is text, ``010`` is 8, ``1:30`` is 90 and ``no`` is false, and silently keeps
the last of two equal keys. Here plain scalars follow YAML 1.2 (section 10.3), with numbers in base 10 only.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

_TAG = "tag:yaml.org,2002:"
_YAML_1_1_ONLY = {_TAG + name for name in ("bool", "int", "float", "timestamp")}


def load_yaml(text: str) -> Any:
    """The value of a YAML document.

    Raises:
        yaml.YAMLError: it is not YAML, or a mapping has a key twice.
    """
    try:
        return yaml.load(text, Loader=_StrictLoader)  # a SafeLoader: no objects are made
    except RecursionError as error:
        raise yaml.YAMLError("nested too deeply") from error


class _StrictLoader(yaml.SafeLoader):
    yaml_implicit_resolvers = {  # noqa: RUF012  (PyYAML's name, a class's table)
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in _YAML_1_1_ONLY]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise yaml.composer.ComposerError(
                        None, None, f"the key {key.value!r} is given twice", key.start_mark
                    )
                seen.add((key.tag, key.value))
        return node

    def construct_decimal(self, node: yaml.ScalarNode) -> int:
        """An integer; a leading zero means nothing."""
        return int(self.construct_scalar(node))


_StrictLoader.add_constructor(_TAG + "int", _StrictLoader.construct_decimal)
for _name, _pattern, _first in (
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("int", r"[-+]?\d+$", "-+0123456789"),
    (
        "float",
        r"(?:[-+]?(?:\.\d+|\d+\.\d*|\d+(?=[eE]))(?:[eE][-+]?\d+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        "-+.0123456789",
    ),
):
    _StrictLoader.add_implicit_resolver(_TAG + _name, re.compile(_pattern, re.ASCII), list(_first))
