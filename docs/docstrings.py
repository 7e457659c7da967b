"""An extension of griffe: docstrings whose `Args:` and `Raises:` are sentences, as Markdown."""

import re
import textwrap
from typing import Any

from griffe import Extension, Object

WORDS = re.compile(r"(?:^|(?<=[.;)] ))(Args|Returns|Yields|Raises|Source): ", re.MULTILINE)


class Paragraphs(Extension):
    """Begins a paragraph at each of those words, and takes the indentation of lines below it."""

    def on_instance(self, *, obj: Object, **_: Any) -> None:
        """Called by griffe for each object that it has read."""
        if obj.docstring is not None:
            obj.docstring.value = paragraphs(obj.docstring.value)


def paragraphs(text: str) -> str:
    """Returns the text of a docstring as Markdown."""
    parts = []
    for part in WORDS.sub(r"\n\n**\1:** ", text).split("\n\n"):
        lines = part.strip("\n").splitlines()
        has_begun = bool(lines) and lines[0].startswith("**")
        parts.append("\n".join(map(str.strip, lines)) if has_begun else textwrap.dedent(part))
    return "\n\n".join(parts)
