"""From a checkpoint on disk to tensors and values: verified as a whole before anything is touched.

Owns: the choice of the newest good checkpoint, taken by rank 0 and confirmed by all; verification, each rank 1/W of the bytes; and
copying rows into live tensors, whatever world size wrote them.
Refuses: running code (no pickle), applying a part, and deleting: what is damaged is set aside as `*.corrupt` with the reason beside it.
"""

import contextlib
import hashlib
import json
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from operator import index
from typing import Any, BinaryIO, TypeVar

import torch

from ddp_kit.checkpoint.format.layout import (
    DTYPES,
    JSON_LIMIT,
    PIECE,
    STATE,
    DamagedError,
    Fingerprint,
    FormatError,
    Manifest,
    Stored,
    folder_of,
    parse_json,
    parse_manifest,
    read_exactly,
    read_header,
)
from ddp_kit.checkpoint.format.sharding import Shape, covers
from ddp_kit.checkpoint.format.storage import Storage
from ddp_kit.checkpoint.retention import free_name, read_manifest, steps
from ddp_kit.distributed.collectives import from_rank, gather_bytes
from ddp_kit.distributed.local_shard import Fragment, Held, held
from ddp_kit.distributed.process_group import Group
from ddp_kit.errors import ConfigError, DdpKitError, nearest

Read = TypeVar("Read")
Kind = tuple[tuple[int, ...], torch.dtype]  # shape and dtype of a tensor
Item = torch.Tensor | Held | Fragment  # live: whole, split over the ranks, or a part
ATTEMPTS, PAUSE_S = 3, 0.5  # a file server may be away for a moment: that is no damage


@dataclass(frozen=True)
class Opened:
    """A verified checkpoint: its manifest, its values, and where each tensor's pieces are."""

    storage: Storage
    folder: str
    manifest: Manifest
    values: dict[str, Any]
    kinds: Mapping[str, Kind]
    pieces: Mapping[str, list[tuple[str, Stored]]]  # name of the tensor -> (file, piece)

    def copy_into(self, targets: Mapping[str, Item]) -> None:
        """Copies tensors of the checkpoint into live ones of the same shape and dtype, into those rows that are here of ones that the ranks
        hold in parts. Raises: OSError, which must end the run.
        """
        parts = {
            name: held(item) if isinstance(item, torch.Tensor) else item
            for name, item in targets.items()
        }
        places = {
            name: part.rows() if isinstance(part, Fragment) else part
            for name, part in parts.items()
        }
        by_file: dict[str, list[Stored]] = {}
        for name, place in places.items():
            for file, stored in self.pieces[name]:
                if stored.piece.start < place.stop and place.start < stored.piece.stop:
                    by_file.setdefault(file, []).append(stored)
        for file, items in sorted(by_file.items()):
            with self.storage.open(f"{self.folder}/{file}") as opened:
                for stored in sorted(items, key=lambda item: item.offset):
                    _read_rows(opened, stored, places[stored.piece.name], name=file)
        for name, part in parts.items():
            if isinstance(part, Fragment):
                part.take(places[name])

    def tensor(self, name: str) -> torch.Tensor:
        """Returns a tensor of the checkpoint in host memory."""
        shape, dtype = self.kinds[name]
        tensor = torch.empty(shape, dtype=dtype)
        self.copy_into({name: tensor})
        return tensor


@torch.no_grad()
def _read_rows(file: BinaryIO, stored: Stored, target: Held, *, name: str) -> None:
    begin, end = max(stored.piece.start, target.start), min(stored.piece.stop, target.stop)
    rows = target.rows[begin - target.start : end - target.start] if target.shape else target.rows
    is_direct = rows.device.type == "cpu" and rows.is_contiguous() and rows.dtype == stored.dtype
    place = rows if is_direct else torch.empty(rows.shape, dtype=stored.dtype)
    flat = place.reshape(-1).view(torch.uint8).numpy()
    view = memoryview(flat)  # type: ignore[arg-type]  # NumPy's stubs lack the buffer protocol before Python 3.12
    file.seek(
        stored.offset
        + (begin - stored.piece.start) * (stored.nbytes // (stored.piece.stop - stored.piece.start))
    )
    while view:
        count = file.readinto(view)  # type: ignore[attr-defined]  # BinaryIO of typeshed lacks it; raw files and BytesIO have it
        if not count:
            raise OSError(f"{name} ended while it was read")
        view = view[count:]
    if place is not rows:
        rows.copy_(place)


def open_checkpoint(storage: Storage, step: int, *, group: Group) -> Opened:
    """Verifies a checkpoint and returns it. Every rank calls it; each hashes its part of the files.

    Raises: DamagedError or FormatError on every rank, with the same words.
    """
    content = b""
    error: DdpKitError | None = None
    if group.rank == 0:
        try:
            content = retried(lambda: read_manifest(storage, step)).text()
        except DdpKitError as failure:
            error = failure
    _confirm(group, error)
    manifest = parse_manifest(from_rank(group, content), step=step)
    folder = folder_of(step)
    names = sorted(manifest.files)
    error = None
    try:
        for name in names[group.rank :: group.world_size]:
            retried(
                lambda name=name: verify_file(storage, f"{folder}/{name}", manifest.files[name])
            )  # type: ignore[misc]  # mypy: lambda's default
    except DdpKitError as failure:
        error = failure
    _confirm(group, error)
    try:
        opened = retried(lambda: describe(storage, folder, manifest))
    except DdpKitError as failure:
        error = failure
    _confirm(group, error)
    return opened


def _confirm(group: Group, error: DdpKitError | None) -> None:
    """Raises the first rank's error on every rank."""
    kind = "format" if isinstance(error, FormatError) else "damage"
    for row in gather_bytes(group, json.dumps([kind, str(error)]).encode() if error else b""):
        if row:
            kind, text = json.loads(row)
            raise (FormatError if kind == "format" else DamagedError)(text)


def retried(read: Callable[[], Read]) -> Read:
    """Returns what `read` returns, after some attempts if the system says no. Raises: DamagedError if a file stays missing, OSError."""
    for attempt in range(ATTEMPTS):
        try:
            return read()
        except OSError as error:
            if attempt == ATTEMPTS - 1:
                if isinstance(error, FileNotFoundError):
                    raise DamagedError(f"{error.filename} is missing") from error
                raise
            time.sleep(PAUSE_S)
    raise AssertionError


def verify_file(
    storage: Storage, path: str, wanted: Fingerprint, *, thorough: bool = False
) -> None:
    """Compares a file with its size and CRC-32, `thorough` with its SHA-256 too.

    Raises: DamagedError if it differs; OSError if it cannot be read.
    """
    digest, crc, room = hashlib.sha256(), 0, memoryview(bytearray(PIECE))
    with storage.open(path) as file:
        size = file.seek(0, 2)
        if size != wanted.size:  # before a large file is read in vain
            raise DamagedError(f"{path} has {size} bytes, its manifest says {wanted.size}")
        file.seek(0)
        while count := file.readinto(room):  # type: ignore[attr-defined]  # BinaryIO of typeshed lacks it; raw files and BytesIO have it
            crc = zlib.crc32(room[:count], crc)
            if thorough:
                digest.update(room[:count])
    if crc != wanted.crc32 or (thorough and digest.hexdigest() != wanted.sha256):
        raise DamagedError(
            f"{path} does not have the {'SHA-256' if crc == wanted.crc32 else 'CRC-32'} of its manifest"
        )


def describe(storage: Storage, folder: str, manifest: Manifest) -> Opened:
    """Returns a checkpoint whose headers agree with each other and with state.json. Raises: DamagedError."""
    if manifest.files[STATE].size > JSON_LIMIT:
        raise DamagedError(f"{STATE} has {manifest.files[STATE].size} bytes")
    with storage.open(f"{folder}/{STATE}") as file:
        values = parse_json(read_exactly(file, manifest.files[STATE].size, name=STATE), STATE)
    pieces: dict[str, list[tuple[str, Stored]]] = {}
    for name, (size, *_) in manifest.files.items():
        if name != STATE:
            with storage.open(f"{folder}/{name}") as file:
                for stored in read_header(file, size=size, name=name):
                    pieces.setdefault(stored.piece.name, []).append((name, stored))
    try:
        kinds = {
            name: (tuple(map(index, shape)), DTYPES[dtype])
            for name, (shape, dtype) in values.pop("tensors").items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DamagedError(f"{STATE} does not say which tensors there are") from error
    for name, (_, dtype) in kinds.items():
        if dtype == torch.complex128:
            pieces[name] = [(file, stored.unpaired()) for file, stored in pieces.get(name, [])]
    shapes = {name: Shape(shape, dtype.itemsize) for name, (shape, dtype) in kinds.items()}
    wrong = [name for name, shape in shapes.items() if min(shape.shape, default=0) < 0]
    wrong += covers([stored.piece for items in pieces.values() for _, stored in items], shapes)
    for name in set(pieces) & set(kinds):
        shape, dtype = kinds[name]
        wrong += [
            name
            for _, stored in pieces[name]
            if stored.shape[1:] != shape[1:] or stored.dtype != dtype
        ]
    if wrong:
        raise DamagedError(
            f"its shards do not hold the whole of {', '.join(sorted(set(wrong))[:5])}"
        )
    return Opened(
        storage, folder, manifest, values, kinds, {name: pieces.get(name, []) for name in kinds}
    )


def candidates(storage: Storage, *, group: Group) -> list[int]:
    """Returns the steps that rank 0 finds, newest first."""
    own = steps(storage) if group.rank == 0 else []
    found: list[int] = json.loads(from_rank(group, json.dumps(own).encode()))
    return found


def open_newest(
    storage: Storage, *, group: Group, sets_aside: bool
) -> Iterator[tuple[Opened | None, str]]:
    """Yields the newest good checkpoint and stops; before it, for each damaged one, (None, what became of it). Every rank iterates.

    Args: `sets_aside` renames what is damaged: for the life that holds the run's directory; others only pass it over.

    Raises: FormatError if one that a later ddp_kit wrote comes first.
    """
    for step in candidates(storage, group=group):
        try:
            yield open_checkpoint(storage, step, group=group), ""
            return
        except DamagedError as error:
            if group.rank == 0 and sets_aside:
                _set_aside(storage, folder_of(step), str(error))
            fate = f"set aside as {folder_of(step)}.corrupt" if sets_aside else "passed over"
            yield None, f"{folder_of(step)} is damaged ({error}); it is {fate}"
        except FormatError as error:
            raise FormatError(f"{folder_of(step)}: {error}") from error


def _set_aside(storage: Storage, folder: str, reason: str) -> None:
    target = free_name(storage, f"{folder}.corrupt")
    storage.rename(folder, target)
    with contextlib.suppress(OSError):
        storage.write(f"{target}/REASON", memoryview(f"{reason}\n".encode()))


def misfits(found: Mapping[str, Kind], wanted: Mapping[str, Kind]) -> dict[str, str]:
    """Returns a row of a table for each tensor that is missing, unexpected or of another shape or dtype, by its name."""
    rows = {}
    for name in sorted({*found, *wanted}):
        if name not in found:
            near = nearest(name, set(found) - set(wanted))
            rows[name] = (
                f"  missing     {name} {wanted[name][0]}{f'   (the same? type --rename {near}={name})' if near else ''}"
            )
        elif name not in wanted:
            rows[name] = f"  unexpected  {name} {found[name][0]}"
        elif found[name][0] != wanted[name][0]:
            rows[name] = f"  shape       {name}: here {wanted[name][0]}, there {found[name][0]}"
        elif found[name][1] != wanted[name][1]:
            rows[name] = f"  dtype       {name}: here {wanted[name][1]}, there {found[name][1]}"
    return rows


def table(rows: Mapping[str, str]) -> str:
    """Returns the first twenty rows, and how many more there are."""
    return "\n".join(
        [
            *list(rows.values())[:20],
            *([f"  ... and {len(rows) - 20} more"] if len(rows) > 20 else []),
        ]
    )


def require_fit(
    found: Mapping[str, Kind], wanted: Mapping[str, Kind], *, where: str, hint: str = ""
) -> None:
    """Raises: ConfigError with a table of what does not fit, and the hint; nothing has been applied then."""
    if rows := misfits(found, wanted):
        raise ConfigError(f"{where} does not fit; nothing was loaded.\n{table(rows)}{hint}")
