"""Curves drawn with braille dots, four to a cell's height and two to its width.

Rows come without colours; the caller styles the cells it gets.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Point = tuple[float, float]
# The braille bit of (row, column) inside a cell.
DOTS = (
    (0x01, 0x08),
    (0x02, 0x10),
    (0x04, 0x20),
    (0x40, 0x80),
)
LOG_FROM = 20.0  # ratio of largest to smallest value from which the axis is logarithmic
LABEL = 9


@dataclass(frozen=True)
class _Across:
    """The horizontal axis."""

    first: float
    last: float

    def column(self, x: float, columns: int) -> int:
        span = (self.last - self.first) or 1
        return round((x - self.first) / span * (columns - 1))


@dataclass(frozen=True)
class _Upwards:
    """The vertical axis, whose highest value is in row 0."""

    low: float
    high: float

    @property
    def is_log(self) -> bool:
        return self.low > 0 and self.high / self.low > LOG_FROM

    def row(self, value: float, rows: int) -> int:
        span = self._scaled(self.high) - self._scaled(self.low)
        if not span:
            return rows // 2
        return round((self._scaled(self.high) - self._scaled(value)) / span * (rows - 1))

    def value_at(self, share: float) -> float:
        """Returns the value at a share of the way down."""
        if self.is_log:
            ratio: float = (self.low / self.high) ** share
            return self.high * ratio
        return self.high - share * (self.high - self.low)

    def _scaled(self, value: float) -> float:
        if self.is_log:
            return math.log10(value)
        return value


def draw(
    line: Sequence[Point],
    marks: Mapping[str, Sequence[Point]],
    *,
    width: int,
    height: int,
    across: str = "step",
) -> list[str]:
    """Returns a frame of `height` + 2 rows, `width` characters wide; no rows if nothing is finite.

    `line` is drawn in dots, `marks` as {character: points} over it; `across` names the horizontal
    axis. Dots are means over a column; what is not finite is left out.
    """
    line = _finite(line)
    marks = {mark: _finite(points) for mark, points in marks.items()}
    everything = list(line)
    for points in marks.values():
        everything += points
    if not everything:
        return []
    columns = max(width - LABEL - 2, 8)
    steps = [x for x, _ in everything]
    x_axis = _Across(min(steps), max(steps))
    means = _column_means(line, x_axis, columns=2 * columns)
    values = list(means.values())
    for points in marks.values():
        values += [y for _, y in points]
    y_axis = _Upwards(min(values), max(values))
    dot_rows = {column: y_axis.row(mean, 4 * height) for column, mean in means.items()}
    cells = _dots(dot_rows, columns=columns, height=height)
    for mark, points in marks.items():
        for x, y in points:
            cells[y_axis.row(y, height)][x_axis.column(x, columns)] = mark
    return _framed(cells, x_axis, y_axis, across=across)


def _framed(
    cells: Sequence[Sequence[str]], x_axis: _Across, y_axis: _Upwards, *, across: str
) -> list[str]:
    """Returns the rows of cells with three labels on the left and one below each end."""
    height = len(cells)
    columns = len(cells[0])
    labels = dict.fromkeys(range(height), "")
    labels[0] = f"{y_axis.high:.3g}"
    labels[height // 2] = f"{y_axis.value_at((height // 2) / (height - 1)):.3g}"
    labels[height - 1] = f"{y_axis.low:.3g}"
    rows = [f"{labels[at]:>{LABEL}} ┤{''.join(row)}" for at, row in enumerate(cells)]
    left = f"{x_axis.first:g}"
    right = f"{x_axis.last:g}"
    title = across
    if y_axis.is_log:
        title = f"{across}, logarithmic loss"
    title = title.center(columns - len(left) - len(right))
    rows.append(f"{'':{LABEL}} └{'─' * columns}")
    rows.append(f"{'':{LABEL}}  {left}{title}{right}")
    return rows


def _finite(points: Sequence[Point]) -> list[Point]:
    return [(x, y) for x, y in points if math.isfinite(y)]


def _column_means(points: Sequence[Point], x_axis: _Across, *, columns: int) -> dict[int, float]:
    """Returns the mean value of each column of dots that has points, from left to right."""
    sums: dict[int, float] = {}
    counts: dict[int, int] = {}
    for x, y in points:
        column = x_axis.column(x, columns)
        sums[column] = sums.get(column, 0.0) + y
        counts[column] = counts.get(column, 0) + 1
    return {column: sums[column] / counts[column] for column in sorted(sums)}


def _dots(rows: Mapping[int, int], *, columns: int, height: int) -> list[list[str]]:
    """Returns the cells of a connected line through (dot column, dot row)."""
    bits = [[0] * columns for _ in range(height)]
    path = sorted(rows.items())
    # The last point is joined to itself, so a line of one point is a dot.
    for (column, row), (next_column, next_row) in zip(path, path[1:] + path[-1:], strict=True):
        steps = max(abs(next_row - row), next_column - column, 1)
        for part in range(steps + 1):
            dot_column = column + round((next_column - column) * part / steps)
            dot_row = row + round((next_row - row) * part / steps)
            bits[dot_row // 4][dot_column // 2] |= DOTS[dot_row % 4][dot_column % 2]
    return [[_braille(bits_of_cell) for bits_of_cell in row] for row in bits]


def _braille(bits: int) -> str:
    return chr(0x2800 + bits) if bits else " "
