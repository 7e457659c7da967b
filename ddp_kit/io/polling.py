"""Waiting for what nobody announces: a file, a key of a store, the end of a process."""

import time
from collections.abc import Callable


def wait_until(condition: Callable[[], bool], *, within_s: float, pause_s: float) -> bool:
    """Returns whether a condition came true within a time.

    It is asked at once, then after each pause, and a last time once the time is over.

    Args: `within_s` seconds to wait at most (0 or less: it is asked once); `pause_s` seconds
        between two questions.
    """
    end = time.monotonic() + within_s
    while not condition():
        if time.monotonic() >= end:
            return False
        time.sleep(pause_s)
    return True
