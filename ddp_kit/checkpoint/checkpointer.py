"""When a run saves, what it saves, and what it says about it.

All ranks save at the same steps: by the cadence, by an evaluation that all know, or by the control
packet, in which rank 0 says that a person or the clock asked for it.
"""

import hashlib
import json
import math
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ddp_kit.checkpoint.find import Origin, find
from ddp_kit.checkpoint.format.commit import Ranks
from ddp_kit.checkpoint.format.encoding import encode
from ddp_kit.checkpoint.format.layout import Manifest
from ddp_kit.checkpoint.format.opened import Opened
from ddp_kit.checkpoint.format.storage import Storage
from ddp_kit.checkpoint.format.writer import ABANDON_S, FAILURES, Saved, Writer
from ddp_kit.checkpoint.retention import Keep, clear, set_aside_newer
from ddp_kit.checkpoint.state_dict import State, state_of
from ddp_kit.data.iterable import StreamPosition, StreamProgress
from ddp_kit.distributed.collectives import from_rank, gather_bytes
from ddp_kit.distributed.pulse import Phase
from ddp_kit.errors import ConfigError
from ddp_kit.io.logs import logger
from ddp_kit.stopping.early_stopping import EarlyStopping
from ddp_kit.training.agreement import require_agreement
from ddp_kit.training.state import Training


@dataclass(frozen=True, kw_only=True)
class About:
    """What a checkpoint says of its run beside the state. `binding` are the settings that a later
    attempt must share.
    """

    run_id: str
    binding: Mapping[str, Any] = field(default_factory=dict)
    steps_per_epoch: int = 0
    length: int = 0


class Checkpointer:
    """Saves one run. Every rank makes one after wrapping, and calls `save` at the same steps."""

    def __init__(
        self,
        training: Training,
        storage: Storage,
        *,
        about: About,
        keep: Keep,
        minutes: float = 0.0,
        early_stopping: EarlyStopping | None = None,
        progress: StreamProgress | None = None,
        on_end: Callable[[Saved], None] | None = None,
        takes_folder: Callable[[], None] | None = None,
    ):
        """Args: `minutes` of wall time after which rank 0 asks for a save; `progress` of data
        with a state of its own; `on_end` hears of each save that has ended; `takes_folder` is
        called on every rank before the first save where another run may save there too: until
        then what is there is left alone.
        """
        self.storage = storage
        self.saved_step = -1  # of the newest checkpoint begun or resumed from
        self.committed_step = -1  # of the newest one that is known to be whole
        self.is_asked = False  # by a person: rank 0 hears of it
        self._training = training
        self._about = about
        self._keep = keep
        self._minutes = minutes
        self._early_stopping = early_stopping
        self._progress = progress
        self._on_end = on_end or _warn
        self._best = math.nan
        group = training.group
        self._token = from_rank(group, uuid.uuid4().hex[:12].encode()).decode()
        self._takes_folder = takes_folder
        self._owns_folder = takes_folder is None
        self._has_looked = False  # for a checkpoint to go on from
        own_group = None
        if group.control_pg is not None:
            own_group = group.join_another(backend="gloo")
        ranks = Ranks(group.rank, group.world_size, own_group)
        self._writer = Writer(storage, ranks, device=group.device, token=self._token, keep=keep)
        group.closing.callback(self._close)
        self._last_save = time.monotonic()

    @property
    def binding(self) -> Mapping[str, Any]:
        """The settings that a later attempt must share."""
        return self._about.binding

    def _close(self) -> None:
        has_failed = self._training.group.has_failed
        self._writer.close(abandon=has_failed)
        if not has_failed:
            # Of the last save of a loop of one's own.
            self.report()

    def is_due(self) -> bool:
        """Whether this rank asks for a save, since it was asked to or by wall time: rank 0's clock
        decides for all.
        """
        is_late = bool(self._minutes) and time.monotonic() - self._last_save > 60 * self._minutes
        return self._training.group.rank == 0 and (self.is_asked or is_late)

    def ask(self) -> None:
        """Asks for a save at the next boundary of all ranks. Any thread may call it."""
        self.is_asked = True

    def prepare(self) -> None:
        """After the first step of an attempt: looks whether the state can be saved, and makes room
        for it in the background. Every rank calls it.

        Raises: ConfigError for a state that is not tensors and plain data.
        """
        state = self._state()
        self._writer.reserve(state.tensors, state.own, state.values)

    def after(self, metrics: Mapping[str, float], *, is_due: bool) -> None:
        """Saves if that is due or an evaluation's `metrics` are the best so far. Every rank calls
        it.

        Raises: SaveError on every rank after three failures in a row.
        """
        if self._improves(metrics) or is_due:
            self._save(metrics)

    def _improves(self, metrics: Mapping[str, float]) -> bool:
        """Whether metrics are the best so far, which they then are from now on."""
        value = metrics.get(self._keep.metric, math.nan)
        is_first = math.isnan(self._best) and not math.isnan(value)
        is_better = value > self._best
        if self._keep.mode == "min":
            is_better = value < self._best
        if is_first or is_better:
            self._best = value
            return True
        return False

    def resumed(self, opened: Opened) -> None:
        """Takes over from the attempt that wrote a checkpoint. Later ones are of a future that this
        attempt does not go on from.
        """
        self.saved_step = opened.manifest.step
        self.committed_step = self.saved_step
        if opened.manifest.best_by in ("", self._best_by()):
            self._best = float(opened.values["best"])
        if self._training.group.rank == 0 and self._owns_folder:
            set_aside_newer(self.storage, self.saved_step)

    def _take_folder(self) -> None:
        """Clears away what a killed attempt left, and what is of no past of this one's."""
        if self._takes_folder is None:
            return
        self._takes_folder()
        self._takes_folder = None
        self._owns_folder = True
        if self._training.group.rank == 0:
            clear(self.storage, token=self._token)
            if self._has_looked:
                set_aside_newer(self.storage, max(self.saved_step, 0))

    def find(self, path: Path) -> Opened | None:
        """Returns the newest good checkpoint of this attempt's own folder at `path`, None without
        one. Every rank calls it.
        """
        self._has_looked = True
        return find(Origin(path), group=self._training.group, sets_aside=self._owns_folder)

    def save(self, metrics: Mapping[str, float], *, again: bool = False) -> None:
        """Begins a save of the current step, unless it has one (`again` replaces it). `metrics` are
        of an evaluation at this step, or {}. Every rank calls it.

        Raises: SaveError on every rank after three failures in a row.
        """
        self._improves(metrics)
        with self._training.group.pulse.during(Phase.SAVE):
            self._save(metrics, again=again)

    def _save(self, metrics: Mapping[str, float], *, again: bool = False) -> None:
        training = self._training
        self.is_asked = False
        if training.step == self.saved_step and not again:
            return
        self.finish()
        require_agreement(training)
        self._take_folder()
        state = self._state()
        copied = self._writer.save(
            state.tensors,
            state.own,
            state.values,
            manifest=self._manifest(metrics),
            first=state.buffers,
        )
        training.copied = copied.ready
        self.saved_step = training.step
        self._last_save = time.monotonic()

    def _best_by(self) -> str:
        """Returns how the best checkpoint is told, "" if none is."""
        return f"{self._keep.mode} {self._keep.metric}" if self._keep.metric else ""

    def _manifest(self, metrics: Mapping[str, float]) -> Manifest:
        """Returns the manifest of the current step, without files."""
        training = self._training
        binding = json.dumps(self._about.binding, sort_keys=True)
        finite_or_text: dict[str, float | str] = {}
        for name, value in metrics.items():
            finite_or_text[name] = value if math.isfinite(value) else repr(value)
        return Manifest(
            run_id=self._about.run_id,
            step=training.step,
            world_size=training.group.world_size,
            settings_sha256=hashlib.sha256(binding.encode()).hexdigest(),
            time=time.time(),
            best_by=self._best_by(),
            cursor=training.cursor.told(
                training.step,
                global_batch=training.plan.global_batch,
                steps_per_epoch=self._about.steps_per_epoch,
            ),
            metrics=finite_or_text,
        )

    def _state(self) -> State:
        more: dict[str, Any] = {
            "cursor": {**vars(self._training.cursor), "length": self._about.length},
            "settings": dict(self._about.binding),
            "run_id": self._about.run_id,
            "best": repr(self._best),
        }
        if self._progress is not None:
            more["data"] = self._places(self._progress)
        return state_of(self._training, early_stopping=self._early_stopping, more=more)

    def _places(self, progress: StreamProgress) -> list[Any]:
        """Returns where each rank's data stand after the current step."""
        place = progress.after.get(self._training.step, StreamPosition())
        tensors: dict[str, torch.Tensor] = {}
        own = encode(vars(place), tensors, name="the training data's state_dict")
        if tensors:
            raise ConfigError(
                "the training data's state_dict holds tensors; a checkpoint takes plain data of "
                "it: numbers, texts, lists."
            )
        rows = gather_bytes(self._training.group, json.dumps(own).encode())
        return [json.loads(row) for row in rows]

    def report(self) -> None:
        """Tells of the save that has ended since the last call.

        Raises: what ended the thread, if that was no full disk and its like.
        """
        ended = self._writer.ended()
        if ended is None:
            return
        if not ended.error:
            self.committed_step = ended.step
        self._on_end(ended)

    def newest_whole(self) -> int:
        """Returns the step of the newest whole checkpoint, -1 without one. A save in flight gets
        the time that it has anyhow when the run fails.
        """
        self._writer.wait(within_s=ABANDON_S)
        return max(self.committed_step, self._writer.committed_step)

    def finish(self, *, failures: int = FAILURES) -> None:
        """Waits for the save in flight and tells of it.

        Raises: SaveError if it is the third failure in a row (`failures`).
        """
        with self._training.group.pulse.during(Phase.SAVE):
            self._writer.wait()
        self.report()
        self._writer.raise_repeated(failures)


def _warn(saved: Saved) -> None:
    if saved.error or saved.note:
        logger.warning("%s", saved.error or saved.note)
