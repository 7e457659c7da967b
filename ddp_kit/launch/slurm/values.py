"""How SLURM writes what it is told: times, memory, and options that are passed through to it."""

import re
from collections.abc import Mapping, Sequence

TIME = re.compile(
    r"\d+(:\d{1,2}){0,2}|\d+-\d{1,2}(:\d{1,2}){0,2}|UNLIMITED|INFINITE", re.IGNORECASE
)
MEMORY = re.compile(r"\d+[KMGT]?", re.IGNORECASE)
OPTION = re.compile(r"-{0,2}([a-z][a-z0-9-]*)(=.*)?", re.DOTALL)
# options that the batch script or the plan states itself
OURS = (
    "nodes",
    "ntasks",
    "ntasks-per-node",
    "output",
    "error",
    "open-mode",
    "signal",
    "array",
    "chdir",
    "job-name",
    "comment",
    "requeue",
    "no-requeue",
)
NO_START = ("test-only", "help", "usage", "version")
# with these sbatch makes no job, or does not say which one it has made
NO_JOB = {"sbatch": (*NO_START, "parsable", "quiet", "wait", "wrap"), "srun": NO_START}


def minutes(text: str) -> float:
    """Returns a SLURM time in minutes; infinity for words.

    It is one of MM, MM:SS, HH:MM:SS, D-HH, D-HH:MM and D-HH:MM:SS.
    """
    days, dash, rest = text.rpartition("-")
    parts = rest.split(":")
    if not all(part.isdigit() for part in (*parts, days or "0")):
        return float("inf")
    numbers = [int(part) for part in parts]
    # with a dash hours come first, and alone minutes do
    if not dash and len(numbers) != 3:
        numbers = [0, *numbers]
    hours, mins, seconds = (*numbers, 0, 0)[:3]
    return int(days or 0) * 1440 + hours * 60 + mins + seconds / 60


def options(given: Sequence[str]) -> Mapping[str, str | None]:
    """Returns passed-through options by name; None for one without a value."""
    found: dict[str, str | None] = {}
    for option in given:
        match = OPTION.fullmatch(option)
        if match and match[2] is None:
            found[match[1]] = None
        elif match:
            found[match[1]] = match[2].removeprefix("=")
    return found


def option_faults(program: str, given: Sequence[str]) -> list[str]:
    """Returns what is wrong with the options that are passed through to `program`."""
    faults = []
    for option in given:
        match = OPTION.fullmatch(option)
        if not match or "\n" in option:
            faults.append(
                f"--{program} {option}: expected a long option of {program} as NAME=VALUE or NAME"
            )
            continue
        # sbatch takes the beginnings of names too
        ours = [name for name in OURS if name.startswith(match[1])]
        if ours:
            faults.append(
                f"--{program} {option}: {ours[0]} is set by ddp_kit. "
                "`ddp-kit slurm --help` lists its flags"
            )
        elif match[1] in NO_JOB[program]:
            faults.append(
                f"--{program} {option}: no job would come of it. To see the script: --dry-run"
            )
    return faults
