"""mkdocstrings calls this module: the examples in docstrings, which Markdown would take for quotations, become blocks of code.

Defaults that are written into the type of a parameter go: the signature has them.
"""

import re
from typing import Any

import griffe

DEFAULT = re.compile(r"^( *\w+ : .*?) \(default: .*\)$", re.MULTILINE)
EXAMPLE = re.compile(r"(?:^>>> .*\n?(?:.+\n?)*)", re.MULTILINE)


class Doctests(griffe.Extension):
    """Fence the examples of each docstring."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring:
            text = DEFAULT.sub(r"\1", obj.docstring.value)
            obj.docstring.value = EXAMPLE.sub(lambda found: f"```pycon\n{found[0].rstrip()}\n```\n", text)
