"""Gradient norms far above those of the steps before, judged robustly.

A robust deviation is 1.4826 times the median distance to the median, which a few outliers do not
move; for normal numbers it is the standard deviation. The norm is that of the reduced gradient and
so the same on all ranks, and so is every verdict.
"""

import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

PER_MEDIAN_DISTANCE = 1.4826
# Of the median: norms that hardly vary would make a spike of any difference.
LEAST_DEVIATION = 0.01


@dataclass(frozen=True, kw_only=True)
class Spike:
    """A norm that is one."""

    norm: float
    median: float
    z: float


class Spikes:
    """The norms of the last steps that were applied, by objective."""

    def __init__(self, *, window: int, z: float):
        """Args: `window` how many norms are kept, before which none is judged; `z` from how many
        robust deviations above their median a norm is a spike."""
        self.window = window
        self.z = z
        self._norms: dict[str, deque[float]] = {}

    def judge(self, objective: str, norm: float) -> Spike | None:
        """Returns what is wrong with a norm. One that is no spike is kept, a spike is not."""
        norms = self._norms.setdefault(objective, deque(maxlen=self.window))
        if len(norms) == self.window:
            median = statistics.median(norms)
            distance = statistics.median(abs(each - median) for each in norms)
            deviation = max(PER_MEDIAN_DISTANCE * distance, LEAST_DEVIATION * median)
            z = math.inf
            if deviation > 0:
                z = (norm - median) / deviation
            if norm > median and z > self.z:
                return Spike(norm=norm, median=median, z=z)
        if math.isfinite(norm):
            norms.append(norm)
        return None

    def to_save(self) -> dict[str, list[float]]:
        """Returns what a checkpoint keeps of it."""
        return {objective: list(norms) for objective, norms in self._norms.items()}

    def restore(self, saved: Mapping[str, list[float]]) -> None:
        """Takes what a checkpoint has kept, of a window of any length."""
        self._norms = {name: deque(norms, maxlen=self.window) for name, norms in saved.items()}
