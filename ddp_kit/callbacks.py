"""Two observers for `Recipe.callbacks`: where a step's time goes, and how even the steps are.

They change nothing of a run, and are also examples of the protocol (`recipe.Callback`).
"""

import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ddp_kit.distributed.topology import read_topology
from ddp_kit.io.logs import logger


class Profile:
    """Writes a trace of some steps, one file a rank: `folder/rank-K.json`.

    Perfetto and chrome://tracing show it.
    """

    def __init__(self, folder: str | Path, *, after: int = 10, steps: int = 3):
        """Args: the trace begins after `after` steps and holds `steps` of them."""
        self._path = Path(folder) / f"rank-{read_topology().rank}.json"
        self._first = after
        self._last = after + steps
        # There is one cycle only; without acc_events torch 2.11 warns.
        self._profiler = torch.profiler.profile(acc_events=True)

    def on_start(self, model: nn.Module) -> None:
        """Makes the folder: a name that cannot be written shows now."""
        self._path.parent.mkdir(parents=True, exist_ok=True)

    def on_step(self, step: int) -> None:
        """Starts and ends the trace."""
        if step == self._first:
            self._profiler.start()
        elif step == self._last:
            self._profiler.stop()
            self._profiler.export_chrome_trace(str(self._path))

    def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """An evaluation between two steps is part of the trace."""

    def on_end(self, reason: str) -> None:
        """Says so if the run was too short."""
        if not self._path.exists():
            logger.info("profile: the run ended before step %d, so there is no trace", self._last)


class StepTimes:
    """Logs the spread of step times at the end, on every rank into its own log.

    A rank that is slow now and then slows all.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last = 0.0

    def on_start(self, model: nn.Module) -> None:
        """Starts the clock."""
        self._last = time.perf_counter()

    def on_step(self, step: int) -> None:
        """Takes a step's time."""
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now

    def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Leaves the evaluation out of the next step's time."""
        self._last = time.perf_counter()

    def on_end(self, reason: str) -> None:
        """Logs median, 95th percentile and maximum, without the first step."""
        if len(self.seconds) < 2:
            return
        median, high, most = np.quantile(self.seconds[1:], [0.5, 0.95, 1.0]) * 1e3
        logger.info(
            "step times: median %.3g ms, 95th percentile %.3g ms, longest %.3g ms",
            median,
            high,
            most,
        )
