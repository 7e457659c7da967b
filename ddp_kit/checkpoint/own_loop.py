"""`save` and `restore` of a loop of one's own: a folder of checkpoints, and no run directory.

Looking changes nothing, since the folder may be a live run's. Whoever saves there takes it over.
"""

from collections.abc import Sequence
from pathlib import Path

from ddp_kit.checkpoint.checkpointer import About, Checkpointer
from ddp_kit.checkpoint.format.opened import Opened
from ddp_kit.checkpoint.format.storage import LocalDisk
from ddp_kit.checkpoint.own_lock import lock_folder
from ddp_kit.checkpoint.retention import Keep
from ddp_kit.checkpoint.state_dict import restore_state
from ddp_kit.errors import ConfigError
from ddp_kit.training.nonfinite import look_back
from ddp_kit.training.state import Training


def save(training: Training, path: Path | str) -> None:
    """Saves the state of a loop of one's own into a folder; training waits for the copy only. Every
    rank calls it at the same steps. The newest three stay.

    Raises: SaveError on every rank after three failures in a row; NonFiniteError on every rank,
        with nothing saved, if the last step turns out not to have been applied; ConfigError on
        every rank if another process saves there.
    """
    look_back(training)
    _of_ones_own(training, path).save({})


def restore(training: Training, path: Path | str, *, change: Sequence[str] = ()) -> int:
    """Puts a loop of one's own into the state of the newest good checkpoint in a folder. Every rank
    calls it, before the first step. Nothing in the folder is changed: it may be a live run's.

    Args: `change` ("data",) goes on, at the same step, though the training data are others.
    Returns: the steps that are done, 0 if there is no checkpoint:
        `feed.batches(start=training.step, ...)` goes on with the next one.
    Raises: ConfigError with a table if it does not fit the model and optimizer, or is of another
        global batch or other data, with nothing changed.
    """
    checkpointer = _of_ones_own(training, path)
    # This attempt's own save may be in flight.
    checkpointer.finish()
    opened = checkpointer.find(Path(path))
    if opened is not None:
        _require_same_batch(opened, training)
        if "data" not in change:
            _require_same_data(opened, training)
        restore_state(opened, training)
        checkpointer.resumed(opened)
    return training.step


def _require_same_batch(opened: Opened, training: Training) -> None:
    """Looks at what the steps of a checkpoint consumed, for a loop of one's own.

    Raises: ConfigError if it was another global batch: the step counter would be another place in
        the data.
    """
    step = opened.manifest.step
    samples = opened.manifest.cursor.get("samples", 0)
    now = training.plan.global_batch
    if step and samples and samples != step * now:
        raise ConfigError(
            f"{opened.folder} was saved with a global batch of {samples / step:g} samples, and "
            f"this loop has {now}. Give build_loader the one that it was saved with."
        )


def _require_same_data(opened: Opened, training: Training) -> None:
    """Raises: ConfigError if a checkpoint's steps were at other places in the data."""
    saved = opened.values.get("settings", {})
    for name, now in training.data.items():
        # Checkpoints of before do not tell.
        before = saved.get(name, now)
        if before != now:
            raise ConfigError(
                f"{opened.folder} was saved with other {name} ({before}) than this loop has "
                f"({now}): its steps would be other places in the data. Give build_loader the same "
                'ones on as many ranks, or say restore(..., change=("data",)) to go on with these.'
            )


def _of_ones_own(training: Training, path: Path | str) -> Checkpointer:
    """Returns the checkpointer of a loop of one's own. Raises: ConfigError for a second folder."""
    storage = LocalDisk(Path(path))
    if training.checkpoints is None:
        training.checkpoints = Checkpointer(
            training,
            storage,
            about=About(run_id="own", binding=training.data),
            keep=Keep(),
            takes_folder=lambda: lock_folder(training.group, Path(path)),
        )
    assert isinstance(training.checkpoints, Checkpointer)
    if training.checkpoints.storage != storage:
        raise ConfigError(
            f"this run's checkpoints are in another folder than {path}: save and restore take one "
            "folder for one training."
        )
    return training.checkpoints
