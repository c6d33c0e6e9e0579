"""Prepare docstrings for the site: an extension of Griffe, which parses sources and runs none."""

import re
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Rename the section `Example:` to `Examples:`, the only name that Griffe reads."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = re.sub(
                r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE
            )
