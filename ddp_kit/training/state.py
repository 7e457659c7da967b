"""The state of training: what one optimizer step needs and changes.

Here are `Training`, an objective as it is trained, the wrapped call of a loss, and the sums that a
step leaves behind. What is done with them is said in `step`, `loop` and `evaluation`.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import Optimizer

from ddp_kit.data.batch_plan import BatchPlan
from ddp_kit.data.cursor import Cursor
from ddp_kit.data.rank_batch import RankBatch
from ddp_kit.distributed.control_packet import ControlPacket
from ddp_kit.distributed.process_group import Group
from ddp_kit.errors import DdpKitError
from ddp_kit.metrics import LossSum, Number, Sums, numbers_of
from ddp_kit.model_state.forward_state import ForwardState
from ddp_kit.settings import Precision
from ddp_kit.strategies.base import Strategy
from ddp_kit.strategies.optimizer_view import OptimizerView
from ddp_kit.strategies.precision import LossScale, autocast
from ddp_kit.training.bad_steps import BadSteps
from ddp_kit.training.ema import WeightAverage
from ddp_kit.training.freezing import Freezing, GradientFlags
from ddp_kit.training.loss_count import Count
from ddp_kit.training.optimizer_marks import Marks

# Of a loss's total. In another type the gradient would be rounded to it, and 1 / count with it.
TOTAL_DTYPES = (torch.float32, torch.float64)


class SavesState(Protocol):
    """What training asks of whoever saves its state. Every rank makes the same calls at the same
    steps."""

    committed_step: int
    """of the newest checkpoint that is known to be whole, -1 without one"""

    def prepare(self) -> None:
        """After the first step of an attempt: looks whether the state can be saved, and makes room
        for it."""

    def is_due(self) -> bool:
        """Whether this rank asks for a save."""

    def after(self, metrics: Mapping[str, float], *, is_due: bool) -> None:
        """Saves if that is due or an evaluation's `metrics` are the best so far."""

    def save(self, metrics: Mapping[str, float], *, again: bool = False) -> None:
        """Begins a save of the current step, unless it has one (`again` replaces it)."""

    def report(self) -> None:
        """Tells of the save that has ended since the last call."""

    def finish(self, *, failures: int = 3) -> None:
        """Waits for the save in flight.

        Raises: SaveError after so many failures in a row.
        """


class LossCall(nn.Module):
    """The call of the loss as a module, so that a strategy can wrap the call and the loss still
    gets the bare model."""

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any, Any], LossSum],
        *,
        precision: Precision,
        device: torch.device,
    ):
        super().__init__()
        self.model = model
        self._loss = loss
        self._autocasts = precision in ("bf16", "fp16")
        self._precision = precision
        self._device = device

    def forward(self, batch: Any) -> tuple[torch.Tensor, int | torch.Tensor, Sums]:
        """Returns (total, count, metrics) of a micro-batch: plain containers, in which DDP finds
        the tensors.

        Raises: DdpKitError if the loss returns anything but the sum of a real scalar in full
            precision.
        """
        with autocast(self._precision, self._device) if self._autocasts else nullcontext():
            result = self._loss(self.model, batch)
        if not isinstance(result, LossSum) or not _is_scalar(result.total):
            raise DdpKitError(
                "the loss must return LossSum(total, count) with a scalar tensor as total; it "
                f"returned {_described(result)}. Of a mean: LossMean(mean, count)."
            )
        if result.total.is_complex():
            raise DdpKitError(
                f"the loss's total is {result.total.dtype}; what is minimised is a real number: "
                "its abs() or its real part."
            )
        if result.total.dtype not in TOTAL_DTYPES:
            raise DdpKitError(
                f"the loss's total is {result.total.dtype}; a sum loses digits in it: "
                "LossSum(losses.float().sum(), count)."
            )
        return result.total, result.count, result.metrics


def _is_scalar(total: object) -> bool:
    return isinstance(total, torch.Tensor) and not total.dim()


def _described(result: object) -> str:
    kind = type(result).__name__
    total = result.total if isinstance(result, LossSum) else result
    if isinstance(total, torch.Tensor):
        return f"{kind} with a total of shape {tuple(total.shape)}"
    return kind


@dataclass(kw_only=True, slots=True)
class ObjectiveState:
    """An objective as it is trained."""

    name: str
    # Without what a strategy wraps around it.
    model: nn.Module
    bare: nn.Module
    call: nn.Module
    parameters: list[nn.Parameter]
    # The other objectives': their gradients are not computed.
    frozen: list[nn.Parameter]
    # The recipe's, which has the groups and their rates.
    optimizer: Optimizer
    # Steps it, and gives and takes its state.
    optimizer_view: OptimizerView
    count: Count
    # What the optimizer had before the first step.
    marks: Marks
    # From which the draws of its forward passes and of its optimizer follow.
    forward_key: int
    scheduler: Any = None
    scale: LossScale = field(default_factory=lambda: LossScale(is_on=False))
    # Whether parameters are of several dtypes, or complex.
    is_mixed: bool = False
    # Whether the optimizer reads `found_inf` on the device, and the host one step later.
    is_deferred: bool = False
    # Whether the optimizer may draw random numbers, as one that adds noise does. torch's own never
    # do.
    may_draw: bool = False
    found_inf: torch.Tensor = field(default_factory=lambda: torch.zeros(()))

    # Tensors that are kept ready: the weight of the last backward pass, and 1.
    weight: tuple[float, torch.Tensor] = field(default_factory=lambda: (0.0, torch.zeros(())))
    one: torch.Tensor = field(default_factory=lambda: torch.ones(()))


@dataclass(kw_only=True)
class Training:
    """Everything that an optimizer step needs and changes.

    `step` counts global batches consumed, skipped ones too.
    """

    group: Group
    control_packet: ControlPacket
    strategy: Strategy
    model: nn.Module
    objectives: list[ObjectiveState]
    forward_state: ForwardState
    flags: GradientFlags
    plan: BatchPlan
    # Where in the data a step is.
    cursor: Cursor = field(default_factory=Cursor)
    # What it freezes is thawed in other epochs.
    freezing: Freezing | None = None
    grad_clip: float = 0.0
    average: WeightAverage | None = None
    step: int = 0
    skipped: int = 0
    # Micro-batches of the rank that has most, where ranks run in lockstep.
    rounds: int = 0
    # Defaults for speed that took effect.
    tuned: list[str] = field(default_factory=list)
    # What wrapping found that the user should read at start.
    notes: list[str] = field(default_factory=list)
    # What a loop of one's own must share with a checkpoint of its data, in words.
    data: Mapping[str, str] = field(default_factory=dict)
    # Of a snapshot: the optimizer may change the weights only after it.
    copied: "torch.cuda.Event | None" = None
    # Of the frozen weights, if checkpoints leave them out.
    base_sha256: str = ""
    checkpoints: SavesState | None = None
    # At which the ranks were last seen to hold the same model.
    agreed_step: int = -1
    # Steps between looks whether they do, 0: at saves and evaluations only.
    check_every: int = 500
    bad_steps: BadSteps = field(default_factory=BadSteps)
    # Called before an objective's part of a step, if passes are computed twice.
    look_twice: "Callable[[ObjectiveState, RankBatch], None] | None" = None
    # A deferred step that the host has not seen yet.
    suspect: "tuple[RankBatch, StepSums, torch.Tensor] | None" = None

    def after_first_step(self) -> None:
        """After the first step of an attempt: shorter timeouts, a look at what it has changed, and
        room for the first save. Every rank calls it."""
        self.group.shorten_timeouts()
        self.forward_state.look()
        if self.checkpoints is not None:
            self.checkpoints.prepare()


@dataclass(slots=True)
class StepSums:
    """What a step leaves for the records."""

    # This rank's first micro-batch in the global batch, and how many it has.
    first: int = 0
    size: int = 1
    # Whether the step was left out for what it is: its loss is none to be recorded.
    is_dropped: bool = False
    # Each micro-batch's sums, still on the device, objective by objective.
    parts: list[tuple[str, Sums]] = field(default_factory=list)
    # By objective, where gradients were clipped or watched for spikes.
    grad_norms: dict[str, torch.Tensor] = field(default_factory=dict)
    # Of each objective's parameter groups, as the step used them.
    rates: dict[str, list[Any]] = field(default_factory=dict)

    def names(self) -> list[str]:
        """Returns the names of all sums, with the objectives' names before them, sorted."""
        found: set[str] = set()
        for prefix, sums in self.parts:
            found.update(prefix + name for name in sums)
        return sorted(found)

    def rows(self) -> list[Sums]:
        """Returns the sums of each micro-batch, of all objectives, with the objectives' names
        before them."""
        rows: list[Sums] = []
        for i in range(self.size):
            row: dict[str, tuple[Number, Number]] = {}
            for prefix, sums in self.parts[i :: self.size]:
                row |= {prefix + name: pair for name, pair in sums.items()}
            rows.append(row)
        return rows

    def read(self) -> dict[str, tuple[float, float]]:
        """Returns this rank's part of each sum and count, by name: the loss and the metrics of the
        step's micro-batches. Host-device synchronisation.
        """
        names = self.names()
        found = {}
        rows = numbers_of(self.rows(), names)
        for i, name in enumerate(names):
            found[name] = (sum(row[i][0] for row in rows), sum(row[i][1] for row in rows))
        return found
