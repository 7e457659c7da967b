"""What a run does about a step that must not be applied, and which steps it has left out.

The verdict is the same on all ranks, since it follows from the reduced gradients; so is the list.
A step that is left out is a step all the same: data, counter, schedule and the average of the
weights go on.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ddp_kit.errors import DdpKitError, NonFiniteError
from ddp_kit.training.spikes import Spikes

Policy = Literal["off", "stop", "skip", "rollback"]
DONE = {
    "skip": "skipped on all ranks",
    "rollback": "left out on all ranks, back to the last checkpoint",
}


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A step that must not be applied, in the same words on all ranks."""

    kind: Literal["not_finite", "spike"]
    step: int
    # What was found, and where.
    found: str
    # What the error says that ends a run.
    message: str
    # Where it came from, -1 where that is not known or all are alike.
    rank: int = -1
    # Further fields of its event.
    about: Mapping[str, object] = field(default_factory=dict)

    def words(self) -> str:
        """Returns what was found, after the step."""
        name = "SPIKE" if self.kind == "spike" else "NOT FINITE"
        return f"{name} at step {self.step}: {self.found}"


@dataclass(frozen=True, kw_only=True)
class Told:
    """A step that was dropped, for the log and events.jsonl."""

    fault: Fault
    message: str


class RollBack(Exception):  # noqa: N818  nothing has failed
    """Takes the run back to its last checkpoint; raised on all ranks at one step."""


class BadSteps:
    """What is to be done about bad steps, and those that were dropped. Alike on all ranks."""

    def __init__(
        self,
        *,
        on_nonfinite: Policy = "stop",
        on_spike: Policy = "off",
        most: int = 10,
        spikes: Spikes | None = None,
    ):
        """Args: `most` steps that may be dropped over the whole run; `spikes` what judges the
        gradient norms, None where nobody looks at them."""
        self._policies = {"not_finite": on_nonfinite, "spike": on_spike}
        self._most = most
        self.spikes = spikes
        # Every step that was dropped, by its number from 1.
        self.dropped: set[int] = set()
        # Those of them that are not computed any more.
        self.left_out: set[int] = set()
        self._told: list[Told] = []

    @property
    def only_stops(self) -> bool:
        """Whether a bad step always ends the run, so that its verdict may wait."""
        return self._policies["not_finite"] == "stop" and self.spikes is None

    @property
    def rolls_back(self) -> bool:
        """Whether a bad step may take the run back to a checkpoint."""
        return "rollback" in self._policies.values()

    def drop(self, fault: Fault) -> None:
        """Takes note of a step that was not applied. Every rank calls it.

        Raises: NonFiniteError, of a spike DdpKitError, if that ends the run; RollBack if it goes
            back.
        """
        policy = self._policies[fault.kind]
        kind = DdpKitError if fault.kind == "spike" else NonFiniteError
        if policy == "stop":
            raise kind(fault.message, rank=fault.rank)
        steps = self.dropped | {fault.step}
        if len(steps) > self._most:
            raise kind(
                f"{fault.words()}. {len(self.dropped)} steps have been dropped before it, and "
                f"--max-dropped is {self._most}. {fault.message}",
                rank=fault.rank,
            )
        self.dropped = steps
        count = f"({len(steps)} of at most {self._most})"
        message = f"{fault.words()}; {DONE[policy]} {count}"
        self._told.append(Told(fault=fault, message=message))
        if policy == "rollback":
            self.left_out.add(fault.step)
            raise RollBack(message)

    def take_told(self) -> list[Told]:
        """Returns what has been dropped since the last call."""
        if not self._told:
            return []
        told = self._told
        self._told = []
        return told

    def to_save(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps of it: nothing of a run without."""
        saved: dict[str, Any] = {}
        if self.dropped:
            saved["dropped"] = sorted(self.dropped)
        if self.left_out:
            saved["left_out"] = sorted(self.left_out)
        if self.spikes is not None:
            saved["norms"] = self.spikes.to_save()
        return saved

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Takes what a checkpoint has kept. What is left out stays so: the checkpoint may be older
        than the step."""
        self.left_out |= set(saved.get("left_out", ()))
        self.dropped = set(saved.get("dropped", ())) | self.left_out
        if self.spikes is not None:
            self.spikes.restore(saved.get("norms", {}))
