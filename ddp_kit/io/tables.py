"""Tables of text, for people who read them in a terminal or a log."""

import sys
from collections.abc import Collection, Sequence


def printable(text: str, *, kept: str = "") -> str:
    """Returns the text with a space for each control character, a newline too.

    Args: `kept` are characters that stay all the same.
    """
    return "".join(
        character if character.isprintable() or character in kept else " " for character in text
    )


def aligned(
    rows: Sequence[Sequence[str]],
    *,
    right: Collection[int] = (),
    width: int = sys.maxsize,
    shortest: int = 0,
) -> list[str]:
    """Returns one line for each row, its columns two spaces apart and as wide as their widest cell.

    Args: `rows` all of one length; `right` the columns, from 0, whose texts stand at the right;
        `width` where lines end: the last column, of texts at the left, is cut there, but for its
        first `shortest` characters.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if widths:
        before = sum(widths[:-1]) + 2 * len(widths[:-1])
        widths[-1] = min(widths[-1], max(width - before, shortest))
    lines = []
    for row in rows:
        cells = []
        for column, (text, size) in enumerate(zip(row, widths, strict=True)):
            cells.append(text.rjust(size) if column in right else text[:size].ljust(size))
        lines.append("  ".join(cells).rstrip())
    return lines
