"""An extension of griffe: docstrings whose `Args:` and `Raises:` are sentences, as Markdown."""

import re
import textwrap
from typing import Any

from griffe import Extension, Object

# The name of an argument, where `Args:` stands on a line of its own.
ARGUMENT = re.compile(r"^    (?P<name>\w+): ", re.MULTILINE)
ARGUMENTS = re.compile(r"^Args:\n(?P<lines>(?:    .*\n?)+)", re.MULTILINE)
WORDS = re.compile(r"(?:^|(?<=[.;)] ))(Args|Returns|Yields|Raises|Source): ", re.MULTILINE)


class Paragraphs(Extension):
    """Begins a paragraph at each of those words, and takes the indentation of lines below it."""

    def on_instance(self, *, obj: Object, **_: Any) -> None:
        """Called by griffe for each object that it has read."""
        if obj.docstring is not None:
            obj.docstring.value = paragraphs(obj.docstring.value)


def paragraphs(text: str) -> str:
    """Returns the text of a docstring as Markdown."""
    text = ARGUMENTS.sub(_list, text)
    parts = []
    for part in WORDS.sub(r"\n\n**\1:** ", text).split("\n\n"):
        lines = part.strip("\n").splitlines()
        has_begun = bool(lines) and lines[0].startswith("**")
        parts.append("\n".join(map(str.strip, lines)) if has_begun else textwrap.dedent(part))
    return "\n\n".join(parts)


def _list(found: re.Match[str]) -> str:
    """Returns arguments, one a line, as a list."""
    items = []
    for line in found["lines"].splitlines():
        if ARGUMENT.match(line):
            items.append(ARGUMENT.sub(r"- `\g<name>`: ", line))
        else:
            items.append("  " + line.strip())
    return "**Args:**\n\n" + "\n".join(items) + "\n"
