"""When a run saves, what it saves, and what it says about it.

Owns: the checkpoints of one run, from a step boundary to the record of a save that has ended.
Refuses: deciding alone: all ranks save at the same steps, by the pace, an evaluation all know, or the control packet.
"""

import hashlib
import json
import math
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ddp_kit.checkpoint.find import Origin, find
from ddp_kit.checkpoint.format.commit import Ranks
from ddp_kit.checkpoint.format.encoding import encode
from ddp_kit.checkpoint.format.layout import DamagedError, Manifest
from ddp_kit.checkpoint.format.reader import Opened, open_checkpoint
from ddp_kit.checkpoint.format.storage import LocalDisk, Storage
from ddp_kit.checkpoint.format.writer import FAILURES, Saved, Saver
from ddp_kit.checkpoint.retention import Keep, best, clear, manifests_of, set_aside_newer
from ddp_kit.checkpoint.state_dict import State, model_tensors, restore_state, state_of
from ddp_kit.data.iterable import Course, Place
from ddp_kit.distributed.collectives import from_rank, gather_bytes
from ddp_kit.distributed.local_shard import local
from ddp_kit.distributed.process_group import Group
from ddp_kit.errors import ConfigError
from ddp_kit.io.logs import logger
from ddp_kit.stopping.early_stopping import EarlyStopping
from ddp_kit.training.nonfinite import look_back
from ddp_kit.training.state import Training


@dataclass(frozen=True, kw_only=True)
class About:
    """What a checkpoint says of its run beside the state. `binding` are the settings that a later life must share."""

    run_id: str
    binding: Mapping[str, Any] = field(default_factory=dict)
    steps_per_epoch: int = 0


class Checkpoints:
    """The checkpoints of one run. Every rank makes one after wrapping, and calls `save` at the same steps."""

    def __init__(
        self,
        training: Training,
        storage: Storage,
        *,
        about: About,
        keep: Keep,
        minutes: float = 0.0,
        early_stopping: EarlyStopping | None = None,
        course: Course | None = None,
        on_end: Callable[[Saved], None] | None = None,
    ):
        """Args: `minutes` of wall time after which rank 0 asks for a save; `course` of data with a state of its own; `on_end` hears of
        each save that has ended.
        """
        group = training.group
        self._training, self._about, self._minutes, self._early_stopping = (
            training,
            about,
            minutes,
            early_stopping,
        )
        self._on_end, self._course, self.storage = on_end or _warn, course, storage
        token = from_rank(group, uuid.uuid4().hex[:12].encode()).decode()
        own_group = group.join_another(backend="gloo") if group.control is not None else None
        ranks = Ranks(group.rank, group.world_size, own_group)
        self._saver = Saver(storage, ranks, device=group.device, token=token, keep=keep)
        group.closing.callback(self._close)
        self._last_save, self.is_asked = time.monotonic(), False  # by a person: rank 0 hears of it
        self._keep, self._best = keep, math.nan
        self.saved_step = -1  # of the newest checkpoint begun or resumed from
        self.committed_step = -1  # of the newest one that is known to be whole

    def _close(self) -> None:
        has_failed = self._training.group.has_failed
        self._saver.close(abandon=has_failed)
        if not has_failed:
            self.report()  # of the last save of a loop of one's own

    def is_due(self) -> bool:
        """Whether this rank asks for a save, since it was asked to or by wall time: rank 0's clock decides for all."""
        is_late = bool(self._minutes) and time.monotonic() - self._last_save > 60 * self._minutes
        return self._training.group.rank == 0 and (self.is_asked or is_late)

    def ask(self) -> None:
        """Asks for a save at the next boundary of all ranks. Any thread may call it."""
        self.is_asked = True

    def prepare(self) -> None:
        """After the first step of a life: looks whether the state can be saved, and makes room for it in the background.

        Raises: ConfigError for a state that is not tensors and plain data.
        """
        state = self._state()
        self._saver.reserve(state.tensors, state.own)

    def after(self, metrics: Mapping[str, float], *, is_due: bool) -> None:
        """Saves if that is due or an evaluation's `metrics` are the best so far."""
        if self._improves(metrics) or is_due:
            self._save(metrics)

    def _improves(self, metrics: Mapping[str, float]) -> bool:
        value = metrics.get(self._keep.metric, math.nan)
        is_better = value < self._best if self._keep.mode == "min" else value > self._best
        if is_better or (math.isnan(self._best) and not math.isnan(value)):
            self._best = value
            return True
        return False

    def resumed(self, opened: Opened) -> None:
        """Takes over from the life that wrote a checkpoint. Later ones are of a future that this life does not go on from."""
        self.saved_step, self._best = opened.manifest.step, float(opened.values["best"])
        self.committed_step = self.saved_step
        if self._training.group.rank == 0:
            set_aside_newer(self.storage, self.saved_step)

    def save(self, metrics: Mapping[str, float], *, again: bool = False) -> None:
        """Begins a save of the current step, unless it has one (`again` replaces it). `metrics` are of an evaluation at this step, or {}.

        Raises: SaveError on every rank after three failures in a row.
        """
        self._improves(metrics)
        self._save(metrics, again=again)

    def _save(self, metrics: Mapping[str, float], *, again: bool = False) -> None:
        training, self.is_asked = self._training, False
        if training.step == self.saved_step and not again:
            return
        self.finish()
        state = self._state()
        steps = self._about.steps_per_epoch
        cursor = {
            "step": training.step,
            "epoch": training.step // steps if steps else 0,
            "samples": training.step * training.plan.global_batch,
        }
        manifest = Manifest(
            run_id=self._about.run_id,
            step=training.step,
            world_size=training.group.world_size,
            settings_sha256=hashlib.sha256(
                json.dumps(self._about.binding, sort_keys=True).encode()
            ).hexdigest(),
            time=time.time(),
            best_by=f"{self._keep.mode} {self._keep.metric}" if self._keep.metric else "",
            cursor=cursor,
            metrics={
                name: value if math.isfinite(value) else repr(value)
                for name, value in metrics.items()
            },
        )
        copied = self._saver.save(
            state.tensors, state.own, state.values, manifest=manifest, first=state.buffers
        )
        training.copied = copied.ready
        self.saved_step, self._last_save = training.step, time.monotonic()

    def _state(self) -> State:
        more = {
            "settings": dict(self._about.binding),
            "run_id": self._about.run_id,
            "best": repr(self._best),
        }
        if self._course is not None:
            more["data"] = self._places(self._course)
        return state_of(self._training, early_stopping=self._early_stopping, more=more)

    def _places(self, course: Course) -> list[Any]:
        """Returns where each rank's data stand after the current step."""
        place = course.after.get(self._training.step, Place())
        tensors: dict[str, torch.Tensor] = {}
        own = encode(vars(place), tensors, name="the training data's state_dict")
        if tensors:
            raise ConfigError(
                "the training data's state_dict holds tensors; a checkpoint takes plain data of it: numbers, texts, lists."
            )
        return [
            json.loads(row) for row in gather_bytes(self._training.group, json.dumps(own).encode())
        ]

    def report(self) -> None:
        """Tells of the save that has ended since the last call. Raises: what ended the thread, if that was no full disk and its like."""
        ended = self._saver.ended()
        if ended is not None:
            self.committed_step = self.committed_step if ended.error else ended.step
            self._on_end(ended)

    def finish(self, *, failures: int = FAILURES) -> None:
        """Waits for the save in flight and tells of it. Raises: SaveError if it is the third failure in a row (`failures`)."""
        self._saver.wait()
        self.report()
        self._saver.raise_repeated(failures)


@contextmanager
def best_weights(training: Training, storage: Storage, *, keep: Keep) -> Iterator[int]:
    """Puts the weights of the best checkpoint, as they were evaluated, into the model, and the last ones back at the end. Yields its
    step; without one 0, and the last weights are used as evaluation uses them. Every rank calls it.
    """
    group, model = training.group, training.model
    opened = _open_best(storage, keep, group=group) if keep.metric else None
    if opened is None:
        with training.average.applied() if training.average is not None else nullcontext():
            yield 0
        return
    live = {name: tensor for name, tensor in model_tensors(model).items() if name in opened.kinds}
    last = {name: local(tensor).clone() for name, tensor in live.items()}
    try:
        opened.copy_into(live)
        if training.average is not None:
            averaged = {f"ema/{name}": live.get(f"model/{name}") for name in training.average.names}
            opened.copy_into(
                {name: tensor for name, tensor in averaged.items() if tensor is not None}
            )
        yield opened.manifest.step
    finally:
        with torch.no_grad():
            for name, tensor in last.items():
                local(live[name]).copy_(tensor)


def _open_best(storage: Storage, keep: Keep, *, group: Group) -> Opened | None:
    """Returns the best checkpoint that is whole, None without one. Every rank calls it."""
    damaged: set[int] = set()
    while True:
        manifests = (
            [manifest for manifest in manifests_of(storage) if manifest.step not in damaged]
            if group.rank == 0
            else []
        )
        found = best(manifests, metric=keep.metric, mode=keep.mode)
        step = int(from_rank(group, str(found.step if found else 0).encode()))
        if not step:
            return None
        try:
            return open_checkpoint(storage, step, group=group)
        except DamagedError as error:
            logger.warning(
                "the best checkpoint, of step %d, is damaged (%s): the next best one is used",
                step,
                error,
            )
            damaged.add(step)


def _warn(saved: Saved) -> None:
    if saved.error or saved.note:
        logger.warning("%s", saved.error or saved.note)


def save(training: Training, path: Path | str) -> None:
    """Saves the state of a loop of one's own into a folder; training waits for the copy only. Every rank calls it at the same steps.

    The newest three stay. Raises: SaveError on every rank after three failures in a row; NonFiniteError on every rank, with nothing
    saved, if the last step turns out not to have been applied.
    """
    look_back(training)
    _of_ones_own(training, path).save({})


def restore(training: Training, path: Path | str) -> int:
    """Puts a loop of one's own into the state of the newest good checkpoint in a folder. Every rank calls it, before the first step.

    Returns: the steps that are done, 0 if there is no checkpoint: `feed.batches(start=training.step, ...)` goes on with the next one.
    Raises: ConfigError with a table if it does not fit the model and optimizer, with nothing changed.
    """
    checkpoints = _of_ones_own(training, path)  # clears away what a killed life left
    checkpoints.finish()  # this life's own save may be in flight
    opened = find(Origin(Path(path)), group=training.group, sets_aside=True)
    if opened is not None:
        restore_state(opened, training)
        checkpoints.resumed(opened)
    return training.step


def _of_ones_own(training: Training, path: Path | str) -> Checkpoints:
    storage = LocalDisk(Path(path))
    if training.checkpoints is None:
        if training.group.rank == 0:
            clear(storage)
        training.checkpoints = Checkpoints(
            training, storage, about=About(run_id="own"), keep=Keep()
        )
    assert isinstance(training.checkpoints, Checkpoints)
    if training.checkpoints.storage != storage:
        raise ConfigError(
            f"this run's checkpoints are in another folder than {path}: save and restore take one folder for one training."
        )
    return training.checkpoints
