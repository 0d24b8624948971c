"""What mkdocs does to docstrings before it reads them."""

import re

import griffe


class Examples(griffe.Extension):
    """An ``Example:`` becomes the section that griffe knows, of code and what it prints."""

    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring:
            obj.docstring.value = re.sub(r"(?m)^Example:$", "Examples:", obj.docstring.value)
