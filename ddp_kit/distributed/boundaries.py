"""The boundaries that a rank has passed, and its promise not to pass one before all ranks know
where they meet. See `early_boundary`.
"""

import math
import threading


class Boundaries:
    """Counts, in the training thread; promises are made, kept and taken back by another one."""

    def __init__(self, timeout_s: float) -> None:
        """Args: `timeout_s` how long the other ranks' promises are waited for."""
        self.position = 0
        self._timeout_s = timeout_s
        self._changed = threading.Condition()
        self._promised: float = math.inf
        self._meeting = -1

    def pass_one(self) -> bool:
        """Counts one more boundary, at which a promise is kept. Returns: whether all ranks meet
        there.

        Raises: RuntimeError if the other ranks do not promise in time.
        """
        with self._changed:
            self.position += 1
            if self.position >= self._promised:
                self._wait()
            return self.position == self._meeting

    def _wait(self) -> None:
        if not self._changed.wait_for(lambda: self.position < self._promised, self._timeout_s):
            raise RuntimeError(
                f"Timed out waiting {self._timeout_s:.0f} s for all ranks to agree on a boundary"
            )

    @property
    def is_to_meet(self) -> bool:
        """Whether this rank has yet to come to where all ranks meet."""
        return self.position < self._meeting

    def promise(self) -> int:
        """Returns a boundary that this rank does not pass before `meet_at` or `release`."""
        with self._changed:
            promised = self.position + 1
            self._promised = promised
            return promised

    def meet_at(self, position: int) -> None:
        """Sets where all ranks meet, the same on all of them: none has passed it."""
        with self._changed:
            self._meeting = position
            self._promised = math.inf
            self._changed.notify_all()

    def release(self) -> None:
        """Takes a promise back: the run ends otherwise."""
        with self._changed:
            self._promised = math.inf
            self._changed.notify_all()
