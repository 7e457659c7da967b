"""Early stopping as a value: all ranks feed it the same metric and so take the same decision.

It looks at an evaluation's metrics, on which the ranks agree already: so it needs no collective,
and never sees a training loss.
"""

import math
from dataclasses import dataclass

from ddp_kit.errors import ConfigError
from ddp_kit.settings import EarlyStop


@dataclass
class EarlyStopping:
    """The state a checkpoint can hold: plain numbers. Off while the rule names no metric.

    `stale` counts the evaluations since the last improvement.
    """

    rule: EarlyStop
    best: float = math.nan
    best_step: int = 0
    stale: int = 0

    def update(self, metrics: dict[str, float], *, step: int) -> bool:
        """Takes one evaluation's metrics. A metric that is nan is no improvement.

        Returns: whether to stop.
        Raises: ConfigError if the metric is not among them.
        """
        if not self.rule.metric:
            return False
        if self.rule.metric not in metrics:
            raise ConfigError(
                f"--early-stop.metric {self.rule.metric}: evaluation does not produce it; "
                f"it produces {', '.join(metrics)}."
            )
        value = metrics[self.rule.metric]
        if self._improves(value):
            self.best = value
            self.best_step = step
            self.stale = 0
        else:
            self.stale += 1
        return self.is_over

    def _improves(self, value: float) -> bool:
        if math.isnan(self.best):
            return not math.isnan(value)
        gain = value - self.best
        if self.rule.mode == "min":
            gain = self.best - value
        return gain > self.rule.min_delta

    @property
    def is_over(self) -> bool:
        """Whether the last evaluation was the one that stops the run."""
        return bool(self.rule.metric) and self.stale >= self.rule.patience

    @property
    def reason(self) -> str:
        """Why it stopped, in one line."""
        return (
            f"{self.rule.metric} has not improved on {self.best:.6g} (step {self.best_step}) "
            f"for {self.stale} evaluations"
        )
