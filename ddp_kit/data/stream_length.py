"""Whether a stream has as many samples as it says, looked at while it is read."""

from typing import Any

from ddp_kit.io.logs import logger


def length_of(dataset: Any) -> int:
    """Returns how many samples a stream says it has, 0 if it does not know."""
    try:
        return len(dataset)
    except TypeError:
        return 0


class LengthWatch:
    """Says once that a stream's `__len__` is wrong, and what epochs then mean."""

    def __init__(self, dataset: Any, *, global_batch: int, is_told: bool):
        """Args: `is_told` whether this reader is the one to say it."""
        self._length = length_of(dataset) if is_told else 0
        self._global_batch = global_batch

    def read(self, position: int) -> None:
        """Hears how many samples of a pass have come."""
        if self._length and position > self._length:
            self._say(
                f"gave more than the {self._length} samples that its __len__ says",
                "the stream goes on after them in the same pass",
            )

    def ended(self, position: int) -> None:
        """Hears how many samples there were in a whole pass."""
        if self._length and position != self._length:
            self._say(
                f"gave {position} samples where its __len__ says {self._length}",
                f"the stream begins again after {position // self._global_batch}",
            )

    def _say(self, found: str, after: str) -> None:
        steps = self._length // self._global_batch
        self._length = 0
        logger.warning(
            "the training stream %s: an epoch of this run is %d steps, by which --epochs, "
            "evaluations and checkpoints go, and %s",
            found,
            steps,
            after,
        )
