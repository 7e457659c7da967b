"""Where a run stands in its data, told from the optimizer steps that it has taken.

Step s stands at global batch s, as long as all steps had one global batch and one data set. Where
these were changed on purpose, the steps before count as many as today's settings would have taken
to the same place.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(kw_only=True)
class Cursor:
    """What turns the steps of a run into places in its data, the same on all ranks.

    `ahead` are the steps taken beyond those that today's settings would have taken; `samples_ahead`
    the samples consumed beyond step x global batch. Both may be negative.
    """

    ahead: int = 0
    samples_ahead: int = 0

    def batches(self, step: int) -> int:
        """Returns the global batches of today's size that lie before the place."""
        return step - self.ahead

    def samples(self, step: int, *, global_batch: int) -> int:
        """Returns how many samples `step` steps have consumed."""
        return step * global_batch + self.samples_ahead

    def epoch(self, step: int, *, steps_per_epoch: int) -> int:
        """Returns the epochs that are over, 0 where they have no known length."""
        return self.batches(step) // steps_per_epoch if steps_per_epoch else 0

    def told(self, step: int, *, global_batch: int, steps_per_epoch: int) -> dict[str, int]:
        """Returns how far `step` steps are: "step", "epoch" and "samples"."""
        return {
            "step": step,
            "epoch": self.epoch(step, steps_per_epoch=steps_per_epoch),
            "samples": self.samples(step, global_batch=global_batch),
        }

    def take(self, other: "Cursor") -> None:
        """Becomes another one: several parts of a run hold this one."""
        self.ahead = other.ahead
        self.samples_ahead = other.samples_ahead


def cursor_for(
    told: Mapping[str, int], *, global_batch: int, length: int, goes_on: bool = False
) -> tuple[Cursor, int]:
    """Returns the cursor of a run that goes on with another global batch or other data.

    Epochs that are over stay over. Of the one that has begun the samples stay consumed, rounded
    down to whole global batches.

    Args: `told` as `Cursor.told` has it, and in "offset" the samples into that epoch; `length`
        samples of an epoch now, 0 if that is not known; `goes_on` whether the data go on from a
        state of their own, at the very sample: then the batches that are left count.
    Returns: the cursor, and how many samples come again.
    """
    step = told["step"]
    epoch = told["epoch"]
    offset = told["offset"]
    again = 0
    if not length:
        batches, again = divmod(told["samples"], global_batch)
    else:
        # Data that did not know their length have all samples in one epoch.
        epoch += offset // length
        offset %= length
        steps_per_epoch = length // global_batch
        within = min(offset // global_batch, steps_per_epoch)
        if goes_on:
            within = steps_per_epoch - (length - offset) // global_batch
        elif within < steps_per_epoch:
            again = offset - within * global_batch
        batches = epoch * steps_per_epoch + within
    samples_ahead = told["samples"] - step * global_batch
    return Cursor(ahead=step - batches, samples_ahead=samples_ahead), again
