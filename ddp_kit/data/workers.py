"""Loader workers: torch's DataLoader, whose processes end with the training process alone."""

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Generator, Iterable
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, get_worker_info

from ddp_kit.data.reader import MicroBatch, Reader, Request
from ddp_kit.distributed.pulse import Pulse
from ddp_kit.errors import DataError

# Of prctl.h.
PR_SET_PDEATHSIG = 1


def with_workers(
    dataset: Any,
    requests: Iterable[Request] | None,
    *,
    num_workers: int,
    pulse: Pulse | None = None,
) -> Generator[MicroBatch, None, None]:
    """Yields what torch's DataLoader makes of requests, or of a stream.

    Each request is answered by `dataset.__getitems__`; with None the data set is a stream that
    answers itself. `pulse` is told meanwhile which worker is waited for.
    """
    pulse = Pulse() if pulse is None else pulse
    # Memory of all processes: which sample each worker reads.
    slots = torch.full((num_workers,), -1, dtype=torch.int64).share_memory_()
    batching: dict[str, Any] = {"batch_sampler": requests}
    if requests is None:
        batching = {"batch_size": None}
    loader = DataLoader(
        dataset,
        **batching,
        num_workers=num_workers,
        collate_fn=_as_it_is,
        worker_init_fn=partial(_begin, slots=slots),
        # Its own: the default one belongs to the model.
        generator=torch.Generator(),
        # `prefetch` pins: torch's pinning thread would not look into a MicroBatch.
        pin_memory=False,
    )
    # Blocked here because every thread of a forked worker must inherit it.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        answers: Any = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    before_it = pulse.waits_for
    pulse.waits_for = partial(_awaited, answers, slots=slots)
    try:
        yield from answers
    except DataError as error:
        # torch has put the worker's traceback before the message.
        raise DataError(str(error).rpartition("DataError: ")[2].rstrip()) from error
    finally:
        pulse.waits_for = before_it
        # A traceback would keep it alive, and the garbage collector ends workers only after 5 s.
        answers._shutdown_workers()


def by_one_worker(dataset: Any, requests: Iterable[Request] | None) -> MicroBatch:
    """Returns the first answer of a worker that lives for it alone."""
    with contextlib.closing(with_workers(dataset, requests, num_workers=1)) as answers:
        return next(answers)


def _as_it_is(answer: Any) -> Any:
    return answer


def _begin(worker: int, *, slots: torch.Tensor) -> None:
    """What a worker does first."""
    _die_with_the_parent()
    _obey_the_parent_only(worker)
    info = get_worker_info()
    if info is not None and isinstance(info.dataset, Reader):
        info.dataset.notes = slots.numpy()[worker : worker + 1]


def _die_with_the_parent() -> None:
    """Asks, on Linux, for an end as soon as the training process has died.

    torch's worker looks for that between two batches, which is never where the data set hangs.
    """
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _awaited(answers: Any, *, slots: torch.Tensor) -> str:
    """Returns for which worker the training process waits, and what that reads.

    A thread beside the one that waits asks. The answers come in order, so it is one worker; what
    torch keeps of that is its own affair.
    """
    try:
        number = answers._task_info[answers._rcvd_idx][0]
        pid = answers._workers[number].pid
    except (AttributeError, IndexError, KeyError):
        return ""
    words = f"waiting for loader worker {number} (pid {pid})"
    sample = int(slots[number])
    if sample >= 0:
        words += f", which reads sample {sample}"
    return words


def _obey_the_parent_only(worker: int) -> None:
    """Keeps signals to the whole job from a worker: it lives until the training process ends it.

    That end is a SIGTERM as well, from the parent, and Python waits for it at exit; so it is told
    from others by its sender.
    """
    for name in ("SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    # Elsewhere torch's own handler stays, which ends the worker.
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_wait_for_the_end, args=(os.getppid(),), daemon=True).start()


def _wait_for_the_end(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
