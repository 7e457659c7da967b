"""Early stopping as a value: all ranks feed it the same metric and so take the same decision.

Owns: the rule (patience in evaluations, min_delta, min or max).
Refuses: training losses, and collectives. The metrics it sees are already agreed.
"""

import math
from dataclasses import dataclass

from ddp_kit.errors import ConfigError
from ddp_kit.settings import EarlyStop


@dataclass
class EarlyStopping:
    """The state a checkpoint can hold: plain numbers. Off while the rule names no metric."""

    rule: EarlyStop
    best: float = math.nan
    best_step: int = 0
    stale: int = 0  # evaluations since the last improvement

    def update(self, metrics: dict[str, float], *, step: int) -> bool:
        """Takes one evaluation's metrics; returns whether to stop. A metric that is nan is no improvement.

        Raises: ConfigError if the metric is not among them.
        """
        if not self.rule.metric:
            return False
        if self.rule.metric not in metrics:
            raise ConfigError(
                f"--early-stop.metric {self.rule.metric}: evaluation does not produce it; it produces {', '.join(metrics)}."
            )
        value = metrics[self.rule.metric]
        gain = (self.best - value) if self.rule.mode == "min" else (value - self.best)
        if (math.isnan(self.best) and not math.isnan(value)) or gain > self.rule.min_delta:
            self.best, self.best_step, self.stale = value, step, 0
        else:
            self.stale += 1
        return self.is_over

    @property
    def is_over(self) -> bool:
        """Whether the last evaluation was the one that stops the run."""
        return bool(self.rule.metric) and self.stale >= self.rule.patience

    @property
    def reason(self) -> str:
        """Why it stopped, in one line."""
        return f"{self.rule.metric} has not improved on {self.best:.6g} (step {self.best_step}) for {self.stale} evaluations"
