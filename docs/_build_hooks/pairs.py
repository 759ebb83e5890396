"""Docstrings that describe several names at once, `lower, upper: ..`, for griffe, which takes one.

Each gets an entry of its own, with the same text.
"""

import re

import griffe

SEVERAL = re.compile(r"^( +)(\w+(?:, \w+)+):( .*(?:\n\1 +\S.*)*)", re.MULTILINE)


class Pairs(griffe.Extension):
    """Called for every object once it is loaded."""

    def on_object(self, *, obj: griffe.Object, **_) -> None:
        """Parts the entries."""
        if obj.docstring is not None:
            obj.docstring.value = SEVERAL.sub(_parted, obj.docstring.value)


def _parted(found: re.Match) -> str:
    indent, names, text = found.groups()
    return "\n".join(f"{indent}{name}:{text}" for name in names.split(", "))
