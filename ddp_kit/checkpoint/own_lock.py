"""Who saves into a folder of a loop of one's own: one training at a time.

Two would take each other's checkpoints for their own past, and remove them. Looking into a folder
takes no lock.
"""

import os
from pathlib import Path

from ddp_kit.distributed.collectives import from_rank
from ddp_kit.distributed.process_group import Group
from ddp_kit.errors import ConfigError
from ddp_kit.io.lock import lock_at_once
from ddp_kit.io.polling import wait_until

NAME = "own-loop.lock"
# The loader workers of a killed process hold its files until they see that it is gone.
WITHIN_S = 12.0

# Of this process: trainings that follow each other here are of one mind.
_locked: dict[Path, int] = {}


def lock_folder(group: Group, folder: Path) -> None:
    """Takes a folder for this process until its group is left. Every rank calls it.

    Raises: ConfigError on every rank if a process that lives saves there.
    """
    is_ours = group.rank != 0 or _lock(group, folder.resolve())
    if from_rank(group, b"yes" if is_ours else b"") != b"yes":
        raise ConfigError(
            f"another process saves its checkpoints into {folder}: two trainings there would "
            "remove each other's. Give this one a folder of its own, or wait for the other's end."
        )


def _lock(group: Group, folder: Path) -> bool:
    """Returns whether this process has the folder. Where a file system knows no locks, it does."""
    if folder in _locked:
        return True
    try:
        is_ours = wait_until(lambda: _try(folder), within_s=WITHIN_S, pause_s=0.2)
    except OSError:
        return True
    if is_ours:
        group.closing.callback(_unlock, folder)
    return is_ours


def _try(folder: Path) -> bool:
    descriptor = lock_at_once(folder / NAME)
    if descriptor is None:
        return False
    _locked[folder] = descriptor
    return True


def _unlock(folder: Path) -> None:
    # While it is locked: who opens it just then sees that it is gone, and makes another one.
    (folder / NAME).unlink(missing_ok=True)
    os.close(_locked.pop(folder))
