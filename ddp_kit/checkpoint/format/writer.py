"""Saving beside training: one checkpoint in flight, written by a thread of this rank.

All ranks call `save` at the same steps. While a save runs, its collectives are the thread's, in a
group of their own: those of training would come between them in another order on each rank.
"""

import contextlib
import json
import os
import queue
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ddp_kit.checkpoint.format.commit import Ranks, SaveError, commit
from ddp_kit.checkpoint.format.layout import JSON_LIMIT, STATE, Manifest
from ddp_kit.checkpoint.format.staging import Copied, Staging
from ddp_kit.checkpoint.format.storage import LocalDisk, Storage
from ddp_kit.checkpoint.retention import Keep, retire
from ddp_kit.distributed.local_shard import Held
from ddp_kit.errors import ConfigError

FAILURES = 3  # in a row, after which the run stops
ABANDON_S = 3.0  # for the save in flight when the run fails: its peers may be gone
MIB = 2**20


@dataclass(frozen=True)
class Saved:
    """A save that has ended, the same on all ranks: `error` is empty if it was committed. Rank 0's
    may have a `note`.
    """

    step: int
    nbytes: int
    seconds: float
    error: str = ""
    note: str = ""


def _text_of(values: Mapping[str, Any]) -> bytes:
    """Returns the content of state.json. Raises: ConfigError if it is longer than is ever read."""
    text = json.dumps(values).encode()
    if len(text) > JSON_LIMIT:
        sizes = {len(json.dumps(value)): name for name, value in values.items()}
        largest = max(sizes)
        raise ConfigError(
            f"{STATE} would have {len(text)} bytes, {largest} of them for {sizes[largest]!r}, "
            f"and {JSON_LIMIT} are read at most. Keep what is large there as tensors."
        )
    return text


class Writer:
    """Writes checkpoints of one run. Every rank has one and makes the same calls, `save` at the
    same steps.
    """

    def __init__(
        self, storage: Storage, ranks: Ranks, *, device: torch.device, token: str, keep: Keep
    ):
        """Args: `ranks` with a gloo group that nothing else uses; `token` the same on all ranks,
        new in each attempt of a run.
        """
        self._storage = storage
        self._ranks = ranks
        self._token = token
        self._keep = keep
        self._staging = Staging(rank=ranks.rank, world_size=ranks.world_size, device=device)
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._idle = threading.Event()
        self._idle.set()
        self._outcome: Saved | BaseException | None = None
        self._failures: list[str] = []  # in a row
        self.committed_step = -1  # of the newest save
        self._thread = threading.Thread(target=self._work, name="checkpoint", daemon=True)
        self._thread.start()

    def reserve(
        self,
        tensors: Mapping[str, torch.Tensor],
        own: Mapping[str, Held],
        values: Mapping[str, Any],
    ) -> None:
        """Prepares the buffer in the background, once the optimizer has its state.

        Raises: ConfigError for values that could not be read back.
        """
        self.wait()
        _text_of(values)
        self._submit(lambda: self._staging.reserve(tensors, own))

    def save(
        self,
        tensors: Mapping[str, torch.Tensor],
        own: Mapping[str, Held],
        values: Mapping[str, Any],
        *,
        manifest: Manifest,
        first: Mapping[str, torch.Tensor],
    ) -> Copied:
        """Copies this rank's part of `tensors`, which all ranks have, and its `own`, and begins to
        write them with `values`. Waits for the save before, if there is one.

        Returns: the copy, which on CUDA may not be made yet. See `Staging.copy` for `first`.
        """
        self.wait()
        begin = time.monotonic()
        state = _text_of(values)
        copied = self._staging.copy(tensors, own, first=first)
        self._submit(lambda: self._commit(copied, state, manifest, begin=begin))
        return copied

    def wait(self, within_s: float | None = None) -> None:
        """Returns once no save is in flight, or so many seconds are over."""
        self._idle.wait(within_s)

    def ended(self) -> Saved | None:
        """Returns the save that has ended since the last call, if one has.

        Raises: what ended the thread's work otherwise.
        """
        outcome = self._outcome
        self._outcome = None
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def raise_repeated(self, failures: int) -> None:
        """Raises: SaveError on every rank if the last so many saves failed."""
        if len(self._failures) >= failures:
            what = f"{failures} checkpoints in a row" if failures > 1 else "the last checkpoint"
            raise SaveError(f"{what} could not be written. The last error: {self._failures[-1]}")

    def close(self, *, abandon: bool = False) -> None:
        """Ends the thread, after the save in flight unless that is to be abandoned (peers may be
        gone).
        """
        self._jobs.put(None)
        self._thread.join(timeout=ABANDON_S if abandon else None)

    def _submit(self, job: Callable[[], None]) -> None:
        self._idle.clear()
        self._jobs.put(job)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except BaseException as error:
                # The training thread raises it: `ended`.
                self._outcome = error
            finally:
                self._idle.set()

    def _commit(self, copied: Copied, state: bytes, manifest: Manifest, *, begin: float) -> None:
        if copied.ready is not None:
            copied.ready.synchronize()
        nbytes = 0
        error = ""
        note = ""
        try:
            nbytes = commit(
                self._storage,
                self._ranks,
                shard=copied.content,
                state=state,
                manifest=manifest,
                token=self._token,
            )
            self._failures.clear()
            self.committed_step = manifest.step
        except SaveError as failure:
            error = f"{failure}{self._room(len(copied.content))}"
            self._failures.append(error)
        if self._ranks.rank == 0 and not error:
            try:
                retire(self._storage, self._keep)
            except OSError as failure:
                # Too many checkpoints are no reason to lose one.
                note = f"an old checkpoint could not be deleted: {failure}"
        self._outcome = Saved(manifest.step, nbytes, time.monotonic() - begin, error, note)

    def _room(self, need: int) -> str:
        """Returns what a save needs and has, for a full disk's message."""
        if not isinstance(self._storage, LocalDisk):
            return ""
        with contextlib.suppress(OSError):
            folder = os.fspath(self._storage.root)
            free = shutil.disk_usage(folder).free
            return f" (need {need / MIB:.1f} MiB a rank, have {free / MIB:.1f} MiB in {folder})"
        return ""
