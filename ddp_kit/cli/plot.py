"""Curves drawn with braille dots, four to a cell's height and two to its width.

Owns: scaling, binning and the frame. Refuses: colours; the caller styles the cells it gets.
"""

import math
from collections.abc import Mapping, Sequence

Point = tuple[float, float]
DOTS = (
    (0x01, 0x08),
    (0x02, 0x10),
    (0x04, 0x20),
    (0x40, 0x80),
)  # braille bit of (row, column) inside a cell
LOG_FROM = 20.0  # ratio of largest to smallest value from which the axis is logarithmic
LABEL = 9


def draw(
    line: Sequence[Point],
    marks: Mapping[str, Sequence[Point]],
    *,
    width: int,
    height: int,
    across: str = "step",
) -> list[str]:
    """Returns a frame of `height` + 2 rows, `width` characters wide: `line` in dots, `marks` as {character: points} over it.
    `across` names the horizontal axis.

    Values are means over a column of dots; what is not finite is left out. Returns no rows if nothing is left.
    """
    line = _finite(line)
    marks = {mark: _finite(points) for mark, points in marks.items()}
    everything = [*line, *(point for points in marks.values() for point in points)]
    if not everything:
        return []
    columns = max(width - LABEL - 2, 8)
    first, last = min(x for x, _ in everything), max(x for x, _ in everything)
    binned = _binned(line, first=first, last=last, columns=2 * columns)
    values = [*binned.values(), *(y for points in marks.values() for _, y in points)]
    low, high = min(values), max(values)
    scale = math.log10 if low > 0 and high / low > LOG_FROM else float

    def row(value: float, rows: int) -> int:
        span = scale(high) - scale(low)
        return round((scale(high) - scale(value)) / span * (rows - 1)) if span else rows // 2

    cells = _dots(
        {column: row(value, 4 * height) for column, value in binned.items()},
        columns=columns,
        height=height,
    )
    for mark, points in marks.items():
        for x, y in points:
            cells[row(y, height)][round((x - first) / ((last - first) or 1) * (columns - 1))] = mark
    share = (height // 2) / (height - 1)  # of the way down
    middle = high * (low / high) ** share if scale is math.log10 else high - share * (high - low)
    labels = {0: high, height // 2: middle, height - 1: low}
    rows = [
        f"{_label(labels.get(at)):>{LABEL}} ┤{''.join(row_cells)}"
        for at, row_cells in enumerate(cells)
    ]
    left, right = f"{first:g}", f"{last:g}"
    title = f"{across}{', logarithmic loss' if scale is math.log10 else ''}".center(
        columns - len(left) - len(right)
    )
    return [*rows, f"{'':{LABEL}} └{'─' * columns}", f"{'':{LABEL}}  {left}{title}{right}"]


def _finite(points: Sequence[Point]) -> list[Point]:
    return [(x, y) for x, y in points if math.isfinite(y)]


def _label(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _binned(
    points: Sequence[Point], *, first: float, last: float, columns: int
) -> dict[int, float]:
    """The mean value of each column of dots that has points."""
    sums: dict[int, tuple[float, int]] = {}
    for x, y in points:
        column = round((x - first) / ((last - first) or 1) * (columns - 1))
        total, count = sums.get(column, (0.0, 0))
        sums[column] = (total + y, count + 1)
    return {column: total / count for column, (total, count) in sorted(sums.items())}


def _dots(rows: Mapping[int, int], *, columns: int, height: int) -> list[list[str]]:
    """The cells of a connected line through (dot column, dot row)."""
    bits = [[0] * columns for _ in range(height)]

    def dot(column: int, row: int) -> None:
        bits[row // 4][column // 2] |= DOTS[row % 4][column % 2]

    path = sorted(rows.items())
    for (column, row), (next_column, next_row) in zip(
        path, [*path[1:], path[-1]] if path else [], strict=True
    ):
        steps = max(abs(next_row - row), next_column - column, 1)
        for part in range(steps + 1):
            dot(
                column + round((next_column - column) * part / steps),
                row + round((next_row - row) * part / steps),
            )
    return [[chr(0x2800 + cell) if cell else " " for cell in cells] for cells in bits]
