"""Loader workers: torch's DataLoader, whose processes live and die with the training process alone."""

import contextlib
import os
import signal
import threading
from collections.abc import Generator, Iterable
from typing import Any

import torch
from torch.utils.data import DataLoader

from ddp_kit.data.reader import MicroBatch, Request


def by_one_worker(dataset: Any, requests: Iterable[Request] | None) -> MicroBatch:
    """Returns the first answer of a worker that lives for it alone."""
    with contextlib.closing(with_workers(dataset, requests, num_workers=1)) as answers:
        return next(answers)


def with_workers(
    dataset: Any, requests: Iterable[Request] | None, *, num_workers: int
) -> Generator[MicroBatch, None, None]:
    """Yields what torch's DataLoader makes of requests, each answered by `dataset.__getitems__`, or of a stream that answers itself."""
    whole: dict[str, Any] = (
        {"batch_size": None} if requests is None else {"batch_sampler": requests}
    )
    loader = DataLoader(
        dataset,
        **whole,
        num_workers=num_workers,
        collate_fn=_as_it_is,
        worker_init_fn=_obey_the_parent_only,
        generator=torch.Generator(),  # its own: the default one belongs to the model
        pin_memory=False,  # `placed` pins: torch's pinning thread would not look into a MicroBatch
    )
    before = signal.pthread_sigmask(
        signal.SIG_BLOCK, {signal.SIGTERM}
    )  # every thread of a forked worker must inherit it
    try:
        answers: Any = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    try:
        yield from answers
    finally:
        answers._shutdown_workers()  # a traceback would keep it alive, and the garbage collector ends workers only after 5 s


def _as_it_is(answer: Any) -> Any:
    return answer


def _obey_the_parent_only(worker: int) -> None:
    """Loader workers live until the training process ends them: a signal to the whole job must not take them first.

    That end is a SIGTERM as well, from the parent, and Python waits for it at exit; so it is told from others by its sender.
    """
    for name in ("SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # elsewhere torch's own handler stays, which ends the worker
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_wait_for_the_end, args=(os.getppid(),), daemon=True).start()


def _wait_for_the_end(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
