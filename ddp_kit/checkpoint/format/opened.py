"""A checkpoint that has been opened, and copying its rows into live tensors, whatever world size
wrote them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch

from ddp_kit.checkpoint.format.fit import Kind
from ddp_kit.checkpoint.format.layout import Manifest
from ddp_kit.checkpoint.format.shard import Stored
from ddp_kit.checkpoint.format.storage import Storage
from ddp_kit.distributed.local_shard import Fragment, Held, Item, held

Pieces = Mapping[str, list[tuple[str, Stored]]]  # name of the tensor -> (file, piece)


@dataclass(frozen=True)
class Opened:
    """A verified checkpoint: its manifest, its values, and where each tensor's pieces are."""

    storage: Storage
    folder: str
    manifest: Manifest
    values: dict[str, Any]
    kinds: Mapping[str, Kind]
    pieces: Pieces

    def copy_into(self, targets: Mapping[str, Item]) -> None:
        """Copies tensors of the checkpoint into live ones of the same shape and dtype, into those
        rows that are here of ones that the ranks hold in parts.

        Raises: OSError, which must end the run: some are copied and some are not.
        """
        places: dict[str, Held] = {}
        fragments: dict[str, Fragment] = {}
        for name, item in targets.items():
            part = held(item) if isinstance(item, torch.Tensor) else item
            if isinstance(part, Fragment):
                fragments[name] = part
                places[name] = part.rows()
            else:
                places[name] = part
        for file, items in sorted(self._overlapping(places).items()):
            with self.storage.open(f"{self.folder}/{file}") as opened:
                for stored in sorted(items, key=lambda item: item.offset):
                    _read_rows(opened, stored, places[stored.piece.name], name=file)
        for name, fragment in fragments.items():
            fragment.take(places[name])

    def _overlapping(self, places: Mapping[str, Held]) -> dict[str, list[Stored]]:
        """Returns the pieces that hold some of those rows, by their file."""
        by_file: dict[str, list[Stored]] = {}
        for name, place in places.items():
            for file, stored in self.pieces[name]:
                if stored.piece.start < place.stop and place.start < stored.piece.stop:
                    by_file.setdefault(file, []).append(stored)
        return by_file

    def tensor(self, name: str) -> torch.Tensor:
        """Returns a tensor of the checkpoint in host memory."""
        shape, dtype = self.kinds[name]
        tensor = torch.empty(shape, dtype=dtype)
        self.copy_into({name: tensor})
        return tensor


@torch.no_grad()
def _read_rows(file: BinaryIO, stored: Stored, target: Held, *, name: str) -> None:
    """Reads those rows of a piece that `target` has, straight into them where memory allows."""
    piece = stored.piece
    begin = max(piece.start, target.start)
    end = min(piece.stop, target.stop)
    rows = target.rows
    if target.shape:
        rows = rows[begin - target.start : end - target.start]
    buffer = rows
    if rows.device.type != "cpu" or not rows.is_contiguous() or rows.dtype != stored.dtype:
        buffer = torch.empty(rows.shape, dtype=stored.dtype)
    flat = buffer.reshape(-1).view(torch.uint8).numpy()
    # NumPy's stubs lack the buffer protocol before Python 3.12.
    view = memoryview(flat)  # type: ignore[arg-type]
    row_size = stored.nbytes // (piece.stop - piece.start)
    file.seek(stored.offset + (begin - piece.start) * row_size)
    while view:
        # BinaryIO of typeshed lacks it; raw files and BytesIO have it.
        count = file.readinto(view)  # type: ignore[attr-defined]
        if not count:
            raise OSError(f"{name} ended while it was read")
        view = view[count:]
    if buffer is not rows:
        rows.copy_(buffer)
