"""Opening a checkpoint: which one, and that it is whole, before anything live is touched.

Rank 0 chooses the newest good checkpoint and all ranks confirm it; each verifies 1/W of the bytes.
No code of a file is run (there is no pickle in it), and nothing is deleted: what is damaged may be
all that is left of a run, so it is set aside as `*.corrupt` with the reason beside it.
"""

import contextlib
import hashlib
import json
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from operator import index
from typing import Any, TypeVar

import torch

from ddp_kit.checkpoint.format.fit import Kind
from ddp_kit.checkpoint.format.layout import (
    DTYPES,
    JSON_LIMIT,
    PIECE,
    STATE,
    DamagedError,
    Fingerprint,
    FormatError,
    Manifest,
    folder_of,
    parse_json,
    parse_manifest,
    read_exactly,
)
from ddp_kit.checkpoint.format.opened import Opened, Pieces
from ddp_kit.checkpoint.format.shard import Stored, read_header
from ddp_kit.checkpoint.format.sharding import Shape, covers
from ddp_kit.checkpoint.format.storage import Storage
from ddp_kit.checkpoint.retention import free_name, read_manifest, steps
from ddp_kit.distributed.collectives import from_rank, gather_bytes
from ddp_kit.distributed.process_group import Group
from ddp_kit.errors import DdpKitError

Read = TypeVar("Read")
# A file server may be away for a moment: that is no damage.
ATTEMPTS = 3
PAUSE_S = 0.5


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
    own_files = sorted(manifest.files)[group.rank :: group.world_size]
    error = None
    try:
        for name in own_files:
            retried(partial(verify_file, storage, f"{folder}/{name}", manifest.files[name]))
    except DdpKitError as failure:
        error = failure
    _confirm(group, error)
    try:
        opened = retried(lambda: read_headers(storage, folder, manifest))
    except DdpKitError as failure:
        error = failure
    _confirm(group, error)
    return opened


def _confirm(group: Group, error: DdpKitError | None) -> None:
    """Raises the first rank's error on every rank."""
    own = b""
    if error is not None:
        kind = "format" if isinstance(error, FormatError) else "damage"
        own = json.dumps([kind, str(error)]).encode()
    for row in gather_bytes(group, own):
        if not row:
            continue
        kind, text = json.loads(row)
        if kind == "format":
            raise FormatError(text)
        raise DamagedError(text)


def retried(read: Callable[[], Read]) -> Read:
    """Returns what `read` returns, after some attempts if the system says no.

    Raises: DamagedError if a file stays missing; OSError.
    """
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
    digest = hashlib.sha256()
    crc = 0
    room = memoryview(bytearray(PIECE))
    with storage.open(path) as file:
        size = file.seek(0, 2)
        # Before a large file is read in vain.
        if size != wanted.size:
            raise DamagedError(f"{path} has {size} bytes, its manifest says {wanted.size}")
        file.seek(0)
        # BinaryIO of typeshed lacks `readinto`; raw files and BytesIO have it.
        while count := file.readinto(room):  # type: ignore[attr-defined]
            crc = zlib.crc32(room[:count], crc)
            if thorough:
                digest.update(room[:count])
    if crc != wanted.crc32:
        raise DamagedError(f"{path} does not have the CRC-32 of its manifest")
    if thorough and digest.hexdigest() != wanted.sha256:
        raise DamagedError(f"{path} does not have the SHA-256 of its manifest")


def read_headers(storage: Storage, folder: str, manifest: Manifest) -> Opened:
    """Returns a checkpoint whose headers agree with each other and with state.json.

    Raises: DamagedError if they do not; OSError.
    """
    size = manifest.files[STATE].size
    if size > JSON_LIMIT:
        raise DamagedError(f"{STATE} has {size} bytes")
    with storage.open(f"{folder}/{STATE}") as file:
        values = parse_json(read_exactly(file, size, name=STATE), STATE)
    pieces = _read_headers(storage, folder, manifest)
    kinds = _pop_kinds(values)
    for name, (_, dtype) in kinds.items():
        if dtype == torch.complex128:
            pieces[name] = [(file, stored.unpaired()) for file, stored in pieces.get(name, [])]
    wrong = _not_whole(pieces, kinds)
    if wrong:
        raise DamagedError(f"its shards do not hold the whole of {', '.join(sorted(wrong)[:5])}")
    wanted = {name: pieces.get(name, []) for name in kinds}
    return Opened(storage, folder, manifest, values, kinds, wanted)


def _read_headers(
    storage: Storage, folder: str, manifest: Manifest
) -> dict[str, list[tuple[str, Stored]]]:
    """Returns the pieces of each tensor, with the shard that holds it, as the shards claim."""
    pieces: dict[str, list[tuple[str, Stored]]] = {}
    for name, fingerprint in manifest.files.items():
        if name == STATE:
            continue
        with storage.open(f"{folder}/{name}") as file:
            for stored in read_header(file, size=fingerprint.size, name=name):
                pieces.setdefault(stored.piece.name, []).append((name, stored))
    return pieces


def _pop_kinds(values: dict[str, Any]) -> dict[str, Kind]:
    """Takes the kinds of the tensors out of state.json's values. Raises: DamagedError."""
    kinds: dict[str, Kind] = {}
    try:
        for name, (shape, dtype) in values.pop("tensors").items():
            kinds[name] = (tuple(map(index, shape)), DTYPES[dtype])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DamagedError(f"{STATE} does not say which tensors there are") from error
    return kinds


def _not_whole(pieces: Pieces, kinds: Mapping[str, Kind]) -> set[str]:
    """Returns the names of tensors that the pieces do not hold exactly once, or of another kind."""
    shapes = {name: Shape(shape, dtype.itemsize) for name, (shape, dtype) in kinds.items()}
    wrong = {name for name, shape in shapes.items() if min(shape.shape, default=0) < 0}
    found = []
    for name, items in pieces.items():
        for _, stored in items:
            found.append(stored.piece)
            if name not in kinds:
                continue
            shape, dtype = kinds[name]
            if stored.shape[1:] != shape[1:] or stored.dtype != dtype:
                wrong.add(name)
    return wrong.union(covers(found, shapes))


def candidates(storage: Storage, *, group: Group) -> list[int]:
    """Returns the steps that rank 0 finds, newest first. Every rank calls it."""
    own = steps(storage) if group.rank == 0 else []
    found: list[int] = json.loads(from_rank(group, json.dumps(own).encode()))
    return found


def open_newest(
    storage: Storage, *, group: Group, sets_aside: bool
) -> Iterator[tuple[Opened | None, str]]:
    """Yields the newest good checkpoint and stops; before it, for each damaged one, (None, what
    became of it). Every rank iterates.

    Args: `sets_aside` renames what is damaged: for the attempt that holds the run's directory;
        others only pass it over.
    Raises: FormatError if one that a later ddp_kit wrote comes first.
    """
    for step in candidates(storage, group=group):
        folder = folder_of(step)
        try:
            yield open_checkpoint(storage, step, group=group), ""
            return
        except DamagedError as error:
            if group.rank == 0 and sets_aside:
                _set_aside(storage, folder, str(error))
            fate = f"set aside as {folder}.corrupt" if sets_aside else "passed over"
            yield None, f"{folder} is damaged ({error}); it is {fate}"
        except FormatError as error:
            raise FormatError(f"{folder}: {error}") from error


def _set_aside(storage: Storage, folder: str, reason: str) -> None:
    target = free_name(storage, f"{folder}.corrupt")
    storage.rename(folder, target)
    with contextlib.suppress(OSError):
        storage.write(f"{target}/REASON", memoryview(f"{reason}\n".encode()))
