"""How long a stop takes, from the signal to the committed checkpoint, against the time there is.

It is measured and not guessed: before the first save nothing is known, and nothing is said.
"""

from collections import deque

from ddp_kit.distributed.control_packet import ControlPacket
from ddp_kit.distributed.topology import Topology, environment
from ddp_kit.errors import ConfigError
from ddp_kit.stopping.departure import Pace

# After which torchrun's agent kills the ranks that it has sent SIGTERM.
AGENT_S = 30.0
# Saves, of which the slowest counts.
RECENT = 5


class GracePeriod:
    """What a stop needs, and what it is given. `has_s` is 0 if that is not known."""

    def __init__(self, control_packet: ControlPacket, topology: Topology):
        """Raises: ConfigError if DDP_KIT_GRACE_S is no number."""
        self._control_packet = control_packet
        self._saves = deque[float](maxlen=RECENT)
        self.has_s, self._giver = given_grace(topology)
        self._has_said = False
        self._has_warned = False

    def saved(self, seconds: float) -> None:
        """Takes the duration of a save."""
        self._saves.append(seconds)

    @property
    def needs_s(self) -> float:
        """Seconds that a stop needs at most; 0 while no save has been measured."""
        if not self._saves:
            return 0.0
        return sum(self._control_packet.agreement_s()) + 2 * max(self._saves)

    def pace(self) -> Pace:
        """Returns how far the loop is, for whoever waits for it to leave. Any thread may ask."""
        return Pace(
            boundaries=self._control_packet.boundaries.position,
            needs_s=self.needs_s or sum(self._control_packet.agreement_s()),
            grace_s=self.has_s,
        )

    def statement(self) -> str:
        """Returns the sum in words, the first time that it is known, else ""."""
        if not self._saves or self._has_said:
            return ""
        self._has_said = True
        step_s, agreement_s = self._control_packet.agreement_s()
        save_s = max(self._saves)
        return (
            f"a stop needs up to {_s(self.needs_s)}: "
            f"step {_s(step_s)}, agreement {_s(agreement_s)}, "
            f"save in flight {_s(save_s)}, save {_s(save_s)}"
        )

    def warning(self) -> str:
        """Returns that there is less time than a stop needs, once, else ""."""
        if self._has_warned or not 0 < self.has_s < self.needs_s:
            return ""
        self._has_warned = True
        return (
            f"a stop needs up to {_s(self.needs_s)} and {self._giver} gives {_s(self.has_s)}: "
            "the run may be killed before it has saved. Ask the launcher for a longer grace; "
            "--save-every and --save-minutes bound what is lost."
        )


def given_grace(topology: Topology) -> tuple[float, str]:
    """Returns the seconds between the warning and the kill, 0 if not known, and who gives them.

    Raises: ConfigError if DDP_KIT_GRACE_S is no number.
    """
    has_s = _given_s()
    if topology.launcher == "torchrun" and not 0 < has_s < AGENT_S:
        return AGENT_S, "torchrun's agent"
    return has_s, "DDP_KIT_GRACE_S"


def _given_s() -> float:
    text = environment().get("DDP_KIT_GRACE_S", "")
    try:
        return float(text or 0)
    except ValueError:
        raise ConfigError(f"DDP_KIT_GRACE_S={text!r} is not a number of seconds.") from None


def _s(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
