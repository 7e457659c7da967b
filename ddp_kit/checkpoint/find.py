"""What a path means: a run, its checkpoints, one of them; and the weights in it.

A path that is none of these is an error that says what was expected: a guess would train on from
another state than was meant.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from ddp_kit.checkpoint.format.layout import FOLDER, Manifest, folder_of
from ddp_kit.checkpoint.format.opened import Opened
from ddp_kit.checkpoint.format.reader import open_checkpoint, open_newest
from ddp_kit.checkpoint.format.storage import LocalDisk, Storage
from ddp_kit.checkpoint.retention import best, manifests_of
from ddp_kit.distributed.process_group import Group
from ddp_kit.errors import ConfigError
from ddp_kit.io.logs import logger


@dataclass(frozen=True)
class Origin:
    """Where an attempt begins: a folder of checkpoints, and one of its steps (None: the newest good
    one).
    """

    folder: Path
    step: int | None = None

    @property
    def storage(self) -> LocalDisk:
        """The folder as storage."""
        return LocalDisk(self.folder)


def origin_of(path: Path, *, flag_text: str) -> Origin:
    """Returns what a path of a run, of its checkpoints or of one checkpoint means.

    Raises: ConfigError if it is none of these.
    """
    match = FOLDER.fullmatch(path.name)
    if match:
        if path.is_dir():
            return Origin(path.parent, int(match[1]))
    elif (path / "checkpoints").is_dir():
        return Origin(path / "checkpoints")
    elif _holds_checkpoints(path):
        return Origin(path)
    raise ConfigError(
        f"{flag_text} {path}: expected a run, or one of its checkpoints such as "
        "runs/NAME/checkpoints/step-00000100."
    )


def find(origin: Origin, *, group: Group, sets_aside: bool = False) -> Opened | None:
    """Returns the checkpoint to begin from, verified, or None if there is no good one. Every rank
    calls it. See `open_newest`.

    Raises: DamagedError if the one that was named is damaged; FormatError if a later ddp_kit wrote
        it.
    """
    if origin.step is not None:
        return open_checkpoint(origin.storage, origin.step, group=group)
    for opened, note in open_newest(origin.storage, group=group, sets_aside=sets_aside):
        if opened is not None:
            return opened
        logger.warning("%s", note)
    return None


def is_checkpoint(path: Path) -> bool:
    """Whether a path is a run with checkpoints, a folder of them, or one of them."""
    if FOLDER.fullmatch(path.name) or (path / "checkpoints").is_dir():
        return True
    return _holds_checkpoints(path)


def _holds_checkpoints(path: Path) -> bool:
    return path.is_dir() and any(FOLDER.fullmatch(found.name) for found in path.iterdir())


def best_of(storage: Storage) -> Manifest | None:
    """Returns the best checkpoint by the metric that the run follows; None if none was
    evaluated.
    """
    found = manifests_of(storage)
    if not found:
        return None
    mode, _, metric = found[0].best_by.partition(" ")
    if not metric:
        return None
    return best(found, metric=metric, mode=mode)


def path_of(path: Path, *, is_best: bool, step: int = -1, flag_text: str) -> Path:
    """Returns the path of the best checkpoint of a run, or of that of a step; the path itself where
    neither is asked for.

    Raises: ConfigError if there is none.
    """
    if not is_best and step < 0:
        return path
    origin = origin_of(path, flag_text=flag_text)
    if is_best:
        chosen = best_of(origin.storage)
        if chosen is None:
            raise ConfigError(
                f"{flag_text} {path} --best: no checkpoint in it was evaluated. "
                "Leave --best out for the newest one."
            )
        step = chosen.step
    return origin.folder / folder_of(step)


def weights_of(opened: Opened, *, averaged: bool = True) -> dict[str, torch.Tensor]:
    """Returns the model's tensors by their names in the model; `averaged`: as evaluation used them,
    if the run averages them.
    """
    weights = {}
    for stored in opened.kinds:
        if not stored.startswith("model/"):
            continue
        name = stored.removeprefix("model/")
        source = stored
        if averaged and f"ema/{name}" in opened.kinds:
            source = f"ema/{name}"
        weights[name] = opened.tensor(source)
    return weights
