"""From copied shards to a committed checkpoint: a folder that is whole, or not there.

Owns: the order of the file operations, and the ranks' agreement on every one's outcome.
Refuses: writing into an existing checkpoint, and deciding alone. All ranks call `commit`, each with its own shard.

Written into `step-N.tmp-ID/`: every rank its shard, fsynced; sizes and hashes are gathered; rank 0 adds state.json, opens every file once
more, writes manifest.json last, syncs the folder, renames it and syncs the parent. A crash at any point leaves the checkpoints before.
"""

import contextlib
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from ddp_kit.checkpoint.format.layout import (
    MANIFEST,
    STATE,
    Fingerprint,
    Manifest,
    fingerprint,
    folder_of,
)
from ddp_kit.checkpoint.format.storage import Storage
from ddp_kit.errors import DdpKitError

SEEN_S = 60.0  # how long a file that a rank has written may stay invisible to rank 0 (a network file system's caches)
ROW = struct.Struct("<Q32sI")  # size, SHA-256 and CRC-32 of a rank's shard
WORDS = 400  # bytes of an error's text that travel


class SaveError(DdpKitError):
    """A checkpoint could not be written; the ones before are untouched."""


@dataclass(frozen=True)
class Ranks:
    """The ranks of a save and the gloo group that is theirs alone; None for one process."""

    rank: int
    world_size: int
    group: "dist.ProcessGroup | None" = None

    def gather(self, content: bytes) -> list[bytes]:
        """Returns every rank's bytes; the lengths are equal on all ranks."""
        if self.group is None:
            return [content]
        own = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        every = [torch.empty_like(own) for _ in range(self.world_size)]
        dist.all_gather(every, own, group=self.group)
        return [bytes(other.numpy()) for other in every]


def commit(
    storage: Storage,
    ranks: Ranks,
    *,
    shard: memoryview,
    state: bytes,
    manifest: Manifest,
    token: str,
) -> int:
    """Writes one checkpoint, which is durable on return. Every rank calls it.

    Args: `manifest` without files; `token` is the same on all ranks and used once.
    Returns: bytes written by all ranks. Raises: SaveError on every rank if any failed, naming the first one.
    """
    folder = folder_of(manifest.step)
    temporary = f"{folder}.tmp-{token}"
    name = f"rank-{ranks.rank}.safetensors"
    error = ""
    with ThreadPoolExecutor(
        1, "sha256"
    ) as beside:  # the disk writes while a core hashes: durable in the time of the slower one
        found = beside.submit(fingerprint, shard)
        try:
            storage.write(f"{temporary}/{name}", shard)
        except OSError as failure:
            error = _words(failure)
    size, sha256, crc32 = found.result()
    rows = ranks.gather(ROW.pack(size, bytes.fromhex(sha256), crc32) + _fixed(error))
    own = [ROW.unpack_from(row) for row in rows]
    files = {
        f"rank-{rank}.safetensors": Fingerprint(size, sha256.hex(), crc32)
        for rank, (size, sha256, crc32) in enumerate(own)
    }
    _raise_first(rows, storage, temporary, ranks)
    files[STATE] = fingerprint(memoryview(state))
    error = ""
    if ranks.rank == 0:
        try:
            _publish(storage, temporary, replace(manifest, files=files), state=state)
        except OSError as failure:
            error = _words(failure)
    _raise_first(ranks.gather(bytes(ROW.size) + _fixed(error)), storage, temporary, ranks)
    return sum(file.size for file in files.values())


def _publish(storage: Storage, temporary: str, manifest: Manifest, *, state: bytes) -> None:
    storage.write(f"{temporary}/{STATE}", memoryview(state))
    _see_all(storage, temporary, manifest)
    storage.write(f"{temporary}/{MANIFEST}", memoryview(manifest.text()))
    storage.sync(temporary)
    folder = folder_of(manifest.step)
    if is_again := bool(storage.list(folder)):
        storage.rename(folder, f"{folder}.replaced")  # `clear` puts it back if this is the end
    storage.rename(temporary, folder)
    storage.sync("")
    if is_again:
        storage.remove(f"{folder}.replaced")


def _see_all(storage: Storage, temporary: str, manifest: Manifest) -> None:
    """Opens every file: other hosts' files may need a while to be seen, and a cached `stat` would not tell. Raises: OSError."""
    end = time.monotonic() + SEEN_S
    for name, (size, *_) in manifest.files.items():
        while True:
            try:
                with storage.open(f"{temporary}/{name}") as file:
                    if file.seek(0, 2) == size:
                        break
            except FileNotFoundError:
                pass
            if time.monotonic() > end:
                raise OSError(
                    f"{name} of {size} bytes, as its rank wrote it, is not what rank 0 sees: is this one shared file system?"
                )
            time.sleep(0.1)


def _words(failure: OSError) -> str:
    return f"{failure.strerror or failure}{f': {failure.filename}' if failure.filename else ''}"


def _fixed(text: str) -> bytes:
    return text.encode()[:WORDS].ljust(WORDS, b"\0")


def _raise_first(rows: list[bytes], storage: Storage, temporary: str, ranks: Ranks) -> None:
    for rank, row in enumerate(rows):
        text = row[ROW.size :].rstrip(b"\0").decode(errors="replace")
        if text:
            if ranks.rank == 0:
                with contextlib.suppress(OSError):  # the next start of the run clears it away
                    storage.remove(temporary)
            raise SaveError(f"rank {rank}: {text}")
