"""Who writes what: an even cut of all tensors over the ranks, by bytes, along rows.

The cut is arithmetic on names, shapes and sizes. The ranks do not talk: each computes its own part
from what all know, at a cost that does not grow with their number.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import NamedTuple


class Shape(NamedTuple):
    """A tensor's shape and the bytes of one element."""

    shape: tuple[int, ...]
    itemsize: int

    @property
    def rows(self) -> int:
        """Parts that it can be cut into."""
        return self.shape[0] if self.shape else 1

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return prod(self.shape) * self.itemsize


@dataclass(frozen=True)
class Piece:
    """Rows start to stop - 1 of a tensor; the whole of a scalar is one row."""

    name: str
    start: int
    stop: int


def cut(shapes: Mapping[str, Shape], *, rank: int, world_size: int) -> list[Piece]:
    """Returns a rank's pieces: together all rows of all tensors, each once, and as many bytes on
    each rank as rows allow.

    The tensors lie one after the other on a line of bytes, which is cut into equal parts; each cut
    moves to the nearest row.
    """
    names = list(shapes)
    ends = list(accumulate(shapes[name].nbytes for name in names))
    total = ends[-1] if ends else 0
    begin = total * rank // world_size
    finish = total * (rank + 1) // world_size
    first = bisect_right(ends, begin)
    last = bisect_left(ends, finish)
    if rank == 0:
        # Tensors without elements at the beginning of the line.
        first = 0
    pieces = []
    for i in range(max(first - 1, 0), min(last + 1, len(names))):
        shape = shapes[names[i]]
        offset = ends[i] - shape.nbytes
        start = _row(shape, begin - offset)
        stop = _row(shape, finish - offset)
        if start < stop:
            pieces.append(Piece(names[i], start, stop))
    return pieces


def _row(shape: Shape, position: int) -> int:
    """Returns the row boundary nearest to a position in bytes from the tensor's start."""
    if position <= 0:
        return 0
    if position >= shape.nbytes:
        return shape.rows
    size = shape.nbytes // shape.rows
    return (2 * position + size) // (2 * size)


def covers(pieces: Sequence[Piece], shapes: Mapping[str, Shape]) -> list[str]:
    """Returns the names of tensors that the pieces do not cover exactly once, and of pieces of no
    tensor.
    """
    by_name: dict[str, list[Piece]] = {name: [] for name in shapes}
    for piece in pieces:
        by_name.setdefault(piece.name, []).append(piece)
    wrong = []
    for name, own in by_name.items():
        at = 0  # the row up to which they cover it, -1 after a gap or an overlap
        for piece in sorted(own, key=lambda piece: piece.start):
            if piece.start == at < piece.stop:
                at = piece.stop
            else:
                at = -1
        if name not in shapes or (at != shapes[name].rows and shapes[name].nbytes):
            wrong.append(name)
    return wrong
