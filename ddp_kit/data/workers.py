"""Loader workers: torch's DataLoader, whose processes end with the training process alone."""

import contextlib
import os
import signal
import threading
from collections.abc import Generator, Iterable
from typing import Any

import torch
from torch.utils.data import DataLoader

from ddp_kit.data.reader import MicroBatch, Request
from ddp_kit.errors import DataError


def with_workers(
    dataset: Any, requests: Iterable[Request] | None, *, num_workers: int
) -> Generator[MicroBatch, None, None]:
    """Yields what torch's DataLoader makes of requests, or of a stream.

    Each request is answered by `dataset.__getitems__`; with None the data set is a stream that
    answers itself.
    """
    batching: dict[str, Any] = {"batch_sampler": requests}
    if requests is None:
        batching = {"batch_size": None}
    loader = DataLoader(
        dataset,
        **batching,
        num_workers=num_workers,
        collate_fn=_as_it_is,
        worker_init_fn=_obey_the_parent_only,
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
    try:
        yield from answers
    except DataError as error:
        # torch has put the worker's traceback before the message.
        raise DataError(str(error).rpartition("DataError: ")[2].rstrip()) from error
    finally:
        # A traceback would keep it alive, and the garbage collector ends workers only after 5 s.
        answers._shutdown_workers()


def by_one_worker(dataset: Any, requests: Iterable[Request] | None) -> MicroBatch:
    """Returns the first answer of a worker that lives for it alone."""
    with contextlib.closing(with_workers(dataset, requests, num_workers=1)) as answers:
        return next(answers)


def _as_it_is(answer: Any) -> Any:
    return answer


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
