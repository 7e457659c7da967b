"""Tables of text, for people who read them in a terminal or a log."""

from collections.abc import Collection, Sequence


def aligned(rows: Sequence[Sequence[str]], *, right: Collection[int] = ()) -> list[str]:
    """Returns one line for each row, its columns two spaces apart and as wide as their widest cell.

    Args: `rows` all of one length; `right` the columns, from 0, whose texts stand at the right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = []
        for column, (text, width) in enumerate(zip(row, widths, strict=True)):
            cells.append(text.rjust(width) if column in right else text.ljust(width))
        lines.append("  ".join(cells).rstrip())
    return lines
