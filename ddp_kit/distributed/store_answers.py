"""Asking a store that may never answer: it lives in rank 0, which may be stopped.

A client then waits in C, where no timeout of the store's and no signal ends it. So a thread asks,
and whoever wants to know waits for the thread only so long.
"""

import os
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import TypeVar

Answer = TypeVar("Answer")


def answer_of(question: Callable[[], Answer], *, within_s: float) -> Answer:
    """Returns what a question to the store is answered with.

    Raises: TimeoutError if there is no answer in time; the store is to be asked no more, since the
        thread waits on. And what the question raises.
    """
    answers: queue.SimpleQueue[tuple[Answer | None, BaseException | None]] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put((question(), None))
        except BaseException as error:
            answers.put((None, error))

    # As a store dies torch writes C++ stacks to stderr, which would hide our one line.
    with _without_stderr():
        threading.Thread(target=ask, name="ask-store", daemon=True).start()
        try:
            answer, error = answers.get(timeout=within_s)
        except queue.Empty:
            raise TimeoutError(f"the store has not answered within {within_s:g} s") from None
    if error is not None:
        raise error
    return answer  # type: ignore[return-value]  # the question's, as there was no error


@contextmanager
def _without_stderr() -> Iterator[None]:
    if sys.stderr is not None:
        sys.stderr.flush()
    with ExitStack() as stack:
        # A process that may open no more files says more than it should.
        with suppress(OSError):
            kept = os.dup(2)
            stack.callback(os.close, kept)
            null = os.open(os.devnull, os.O_WRONLY)
            stack.callback(os.close, null)
            os.dup2(null, 2)
            stack.callback(os.dup2, kept, 2)
        yield
