"""Docstrings as the site reads them (an extension of Griffe, which parses the sources and runs nothing)."""

import re
from typing import Any

import griffe


class Examples(griffe.Extension):
    """`Example:` is a section of doctests, as `Examples:` is; Griffe knows the plural alone."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = re.sub(
                r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE
            )
