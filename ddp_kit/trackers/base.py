"""Where the records of a run go: the `Tracker` protocol, and what a tracker is told at start."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from ddp_kit.io.logs import REDACTED as REDACTED


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """What every tracker is told once, at start.

    `total_steps` is 0 if unknown; `settings` hold no secrets any more.
    """

    run_dir: Path
    name: str
    settings: Mapping[str, object] = field(default_factory=dict)
    total_steps: int = 0


class Tracker(Protocol):
    """Receives the records of a run, on rank 0 only.

    It is called on the training thread, so each call must be short. A network that is away for a
    while is no reason to raise. `finish` is called once, however the run ends.
    """

    def start(self, info: RunInfo) -> None:
        """Opens whatever the tracker writes to.

        Called again by each later attempt in the same run directory.
        """
        ...

    def log(self, record: Mapping[str, object]) -> None:
        """Takes one record of metrics.jsonl.

        Its "kind" is "train", "eval" or "test", its "step" counts optimizer steps.
        """
        ...

    def event(self, event: Mapping[str, object]) -> None:
        """Takes one record of events.jsonl, such as a start, a signal or a failure."""
        ...

    def sample(self, name: str, value: object, *, step: int) -> None:
        """Takes what the recipe's `samples` made.

        Args: `value` a text, or an image (C, H, W) or (H, W), float in 0..1 or uint8.
        """
        ...

    def finish(self, status: Mapping[str, object]) -> None:
        """Takes the content of status.json and closes everything."""
        ...


def numbers(record: Mapping[str, object]) -> dict[str, int | float]:
    """Returns the numbers of a record by name, `train/loss`; the step is none of them."""
    found: dict[str, int | float] = {}
    for name, value in record.items():
        if name == "step" or isinstance(value, bool):
            continue
        if isinstance(value, int | float):
            found[f"{record['kind']}/{name}"] = value
    return found
