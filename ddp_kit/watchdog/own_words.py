"""What a rank knows of itself: its collectives, and its pulse in memory."""

import torch.distributed as dist

from ddp_kit.distributed.process_group import Group
from ddp_kit.distributed.pulse import Pulse
from ddp_kit.io.pulse_file import NUMBERS, PulseFile

HAS_SEQUENCES = hasattr(dist.ProcessGroup, "_get_sequence_number_for_group")


def sequences_of(group: Group) -> dict[str, int]:
    """Returns how many collectives this rank has entered in each process group, {} where torch does
    not tell.
    """
    if not HAS_SEQUENCES:
        return {}
    named = {"training": group.pg, "control": group.control_pg}
    if group.sums_pg is not group.pg:
        named["sums"] = group.sums_pg
    for i, other in enumerate(list(group.others)):
        named[f"other {i}"] = other
    found: dict[str, int] = {}
    for name, process_group in named.items():
        if process_group is not None:
            # Not among torch's type stubs.
            known = process_group._get_sequence_number_for_group()  # type: ignore[attr-defined]
            found[name] = known
    return found


def shared(pulse: Pulse) -> PulseFile | None:
    """Lets other processes of this host read a pulse, where the system can."""
    try:
        file = PulseFile()
    except OSError:
        return None
    for at in range(NUMBERS):
        file.numbers[at] = pulse.numbers[at]
    pulse.numbers = file.numbers
    return file
