"""From copied shards to a committed checkpoint: a folder that is whole, or not there.

Written into `step-N.tmp-ID/`: every rank its shard, fsynced; sizes and hashes are gathered; rank 0
adds state.json, opens every file once more, writes manifest.json last, syncs the folder, renames it
and syncs the parent. A crash at any point leaves the checkpoints before.

No rank decides alone: all call `commit`, each with its own shard, and agree on every one's outcome.
"""

import contextlib
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

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
from ddp_kit.io.polling import wait_until

# How long a file that a rank has written may stay invisible to rank 0: a network file system's
# caches.
SEEN_S = 60.0
POLL_S = 0.1
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
    Returns: bytes written by all ranks.
    Raises: SaveError on every rank if any failed, naming the first one.
    """
    temporary = f"{folder_of(manifest.step)}.tmp-{token}"
    own, error = _write_shard(storage, f"{temporary}/{_name_of(ranks.rank)}", shard)
    row = ROW.pack(own.size, bytes.fromhex(own.sha256), own.crc32)
    rows = ranks.gather(row + _fixed(error))
    _raise_first(rows, storage, temporary, ranks)
    files = {}
    for rank, other in enumerate(rows):
        size, sha256, crc32 = ROW.unpack_from(other)
        files[_name_of(rank)] = Fingerprint(size, sha256.hex(), crc32)
    files[STATE] = fingerprint(memoryview(state))
    error = ""
    if ranks.rank == 0:
        try:
            _publish(storage, temporary, replace(manifest, files=files), state=state)
        except OSError as failure:
            error = _words(failure)
    rows = ranks.gather(bytes(ROW.size) + _fixed(error))
    _raise_first(rows, storage, temporary, ranks)
    return sum(file.size for file in files.values())


def _name_of(rank: int) -> str:
    return f"rank-{rank}.safetensors"


def _write_shard(storage: Storage, path: str, shard: memoryview) -> tuple[Fingerprint, str]:
    """Returns a written shard's fingerprint, and what went wrong, "" if nothing did."""
    error = ""
    # The disk writes while a core hashes: durable in the time of the slower one.
    with ThreadPoolExecutor(1, "sha256") as beside:
        found = beside.submit(fingerprint, shard)
        try:
            storage.write(path, shard)
        except OSError as failure:
            error = _words(failure)
    return found.result(), error


def _publish(storage: Storage, temporary: str, manifest: Manifest, *, state: bytes) -> None:
    """Makes a folder of shards a checkpoint. The order is the protocol. Raises: OSError."""
    storage.write(f"{temporary}/{STATE}", memoryview(state))
    _see_all(storage, temporary, manifest)
    storage.write(f"{temporary}/{MANIFEST}", memoryview(manifest.text()))
    storage.sync(temporary)
    folder = folder_of(manifest.step)
    is_again = bool(storage.list(folder))
    if is_again:
        # `clear` puts it back if this process ends here.
        storage.rename(folder, f"{folder}.replaced")
    storage.rename(temporary, folder)
    storage.sync("")
    if is_again:
        storage.remove(f"{folder}.replaced")


def _see_all(storage: Storage, temporary: str, manifest: Manifest) -> None:
    """Opens every file: other hosts' files may need a while to be seen, and a cached `stat` would
    not tell.

    Raises: OSError if one of them is not seen as its rank wrote it.
    """
    end = time.monotonic() + SEEN_S
    for name, wanted in manifest.files.items():
        is_seen = partial(_is_seen, storage, f"{temporary}/{name}", size=wanted.size)
        if not wait_until(is_seen, within_s=end - time.monotonic(), pause_s=POLL_S):
            raise OSError(
                f"{name} of {wanted.size} bytes, as its rank wrote it, is not what rank 0 "
                "sees: is this one shared file system?"
            )


def _is_seen(storage: Storage, path: str, *, size: int) -> bool:
    try:
        with storage.open(path) as file:
            return file.seek(0, 2) == size
    except FileNotFoundError:
        return False


def _words(failure: OSError) -> str:
    text = str(failure.strerror or failure)
    if failure.filename:
        return f"{text}: {failure.filename}"
    return text


def _fixed(text: str) -> bytes:
    return text.encode()[:WORDS].ljust(WORDS, b"\0")


def _raise_first(rows: list[bytes], storage: Storage, temporary: str, ranks: Ranks) -> None:
    """Raises: SaveError with the first rank's error, if there is one."""
    for rank, row in enumerate(rows):
        text = row[ROW.size :].rstrip(b"\0").decode(errors="replace")
        if not text:
            continue
        if ranks.rank == 0:
            # Where it stays, the next start of the run clears it away.
            with contextlib.suppress(OSError):
                storage.remove(temporary)
        raise SaveError(f"rank {rank}: {text}")
