"""What is asked for, checked as a whole before anything starts.

Owns: the plan of a start on this machine, and counting its devices without torch. Refuses: starting anything.
"""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK", "GROUP_WORLD_SIZE")
FOREIGN = ("TORCHELASTIC_", "ACCELERATE_", "SLURM_", "PMI")  # a launcher's own: of a job that this start may be part of


class LaunchError(Exception):
    """The start as asked for cannot be; the message says what to type. Exit code 2, as for any usage error."""

    exit_code = 2


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Ranks on this machine. `words` are the recipe and its flags, handed on as they are."""

    words: tuple[str, ...]
    processes: int = 1
    python: str = sys.executable

    def __post_init__(self) -> None:
        faults = []
        if not self.words:
            faults.append("the recipe is missing: ddp-kit run --nproc-per-node 2 RECIPE.py [recipe flags]")
        elif self.words[0].startswith("-"):
            faults.append(f"{self.words[0]} is no flag of the launcher, and the recipe comes before its own flags. `ddp-kit run --help`")
        elif self.words[0].endswith(".py") and not Path(self.words[0]).is_file():
            faults.append(f"{self.words[0]} is not there (looked in {Path.cwd()})")
        if self.processes < 1:
            faults.append(f"--nproc-per-node {self.processes}: expected 1 or more, or auto")
        if faults:
            raise LaunchError("; ".join(faults) + ".")

    @property
    def command(self) -> list[str]:
        """What each rank runs."""
        return [self.python, "-m", "ddp_kit.train", *self.words]


def clean(environ: Mapping[str, str]) -> dict[str, str]:
    """Returns an environment without the rank variables of whoever has started us."""
    return {name: value for name, value in environ.items() if name not in RANK_VARIABLES and not name.startswith(FOREIGN)}


def processes_of(text: str, *, environ: Mapping[str, str] | None = None, driver: Path = Path("/proc/driver/nvidia/gpus")) -> int:
    """Returns the ranks that `--nproc-per-node` asks for; `auto` is one for each visible GPU, or one. Raises: LaunchError."""
    if text != "auto":
        if not text.isdecimal():
            raise LaunchError(f"--nproc-per-node {text}: expected a number or auto.")
        return int(text)
    visible = (os.environ if environ is None else environ).get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return max(1, len([device for device in visible.split(",") if device.strip() not in ("", "-1")]))
    return max(1, len(list(driver.iterdir()))) if driver.is_dir() else 1
