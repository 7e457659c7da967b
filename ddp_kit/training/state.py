"""The state of training: what one optimizer step needs and changes.

Owns: `Training`, an objective as it is trained, the wrapped call of a loss, and the sums a step leaves behind.
Refuses: doing anything with it: that is `step`, `evaluation` and `fit`.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import Optimizer

from ddp_kit.data.batch_plan import BatchPlan
from ddp_kit.data.loader import RankBatch
from ddp_kit.distributed.control_packet import Control
from ddp_kit.distributed.process_group import Group
from ddp_kit.errors import DdpKitError
from ddp_kit.metrics import LossSum, Number, Totals
from ddp_kit.settings import Precision
from ddp_kit.strategies.base import Strategy
from ddp_kit.strategies.deepspeed.partitions import PartitionedState
from ddp_kit.strategies.precision import LossScale, autocast
from ddp_kit.training.ema import WeightAverage
from ddp_kit.training.loss_count import Count
from ddp_kit.training.running_stats import RunningStatistics

FULL = (torch.float32, torch.float64)
Sums = Mapping[str, tuple[Number, Number]]


class Checkpointer(Protocol):
    """What training asks of whoever saves its state. Every rank makes the same calls at the same steps."""

    committed_step: int
    """of the newest checkpoint that is known to be whole, -1 without one"""

    def prepare(self) -> None:
        """After the first step of a life: looks whether the state can be saved, and makes room for it."""

    def is_due(self) -> bool:
        """Whether this rank asks for a save."""

    def after(self, metrics: Mapping[str, float], *, is_due: bool) -> None:
        """Saves if that is due or an evaluation's `metrics` are the best so far."""

    def save(self, metrics: Mapping[str, float], *, again: bool = False) -> None:
        """Begins a save of the current step, unless it has one (`again` replaces it)."""

    def report(self) -> None:
        """Tells of the save that has ended since the last call."""

    def finish(self, *, failures: int = 3) -> None:
        """Waits for the save in flight. Raises: SaveError after so many failures in a row."""


class LossCall(nn.Module):
    """The call of the loss as a module, so that a strategy can wrap the call and the loss still gets the bare model."""

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any, Any], LossSum],
        *,
        precision: Precision,
        device: torch.device,
    ):
        super().__init__()
        self.model, self._loss = model, loss
        self._autocasts = precision in ("bf16", "fp16")
        self._precision, self._device = precision, device

    def forward(self, batch: Any) -> tuple[torch.Tensor, int | torch.Tensor, Sums]:
        """Returns (total, count, metrics) of a micro-batch: plain containers, in which DDP finds the tensors."""
        with autocast(self._precision, self._device) if self._autocasts else nullcontext():
            result = self._loss(self.model, batch)
        if (
            not isinstance(result, LossSum)
            or not isinstance(result.total, torch.Tensor)
            or result.total.dim()
        ):
            raise DdpKitError(
                f"the loss must return LossSum(total, count) with a scalar tensor as total; it returned {_shape(result)}."
            )
        if result.total.is_complex():
            raise DdpKitError(
                f"the loss's total is {result.total.dtype}; what is minimised is a real number: its abs() or its real part."
            )
        if (
            result.total.dtype not in FULL
        ):  # its gradient would be rounded to that type, 1 / count with it
            raise DdpKitError(
                f"the loss's total is {result.total.dtype}; a sum loses digits in it: LossSum(losses.float().sum(), count)."
            )
        return result.total, result.count, result.metrics


def _shape(result: object) -> str:
    total = result.total if isinstance(result, LossSum) else result
    return f"{type(result).__name__}{f' with a total of shape {tuple(total.shape)}' if isinstance(total, torch.Tensor) else ''}"


@dataclass(kw_only=True, slots=True)
class ObjectiveState:
    """An objective as it is trained."""

    name: str
    call: nn.Module
    parameters: list[nn.Parameter]
    frozen: list[nn.Parameter]  # the other objectives': their gradients are not computed
    optimizer: Optimizer
    count: Count
    scheduler: Any = None
    scale: LossScale = field(default_factory=lambda: LossScale(is_on=False))
    is_mixed: bool = False  # parameters of several dtypes, or complex ones
    is_deferred: bool = (
        False  # the optimizer reads `found_inf` on the device, and the host one step later
    )
    found_inf: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    step: Callable[[], None] | None = None  # the strategy's way to step the optimizer
    owns: Callable[[nn.Parameter], bool] | None = (
        None  # whose optimizer state this rank alone keeps; None: all ranks do
    )
    moments: PartitionedState | None = None  # the optimizer's state by parameter, where it steps partitions
    refresh: Callable[[], None] | None = None  # takes restored weights into those partitions
    weight: tuple[float, torch.Tensor] = field(
        default_factory=lambda: (0.0, torch.zeros(()))
    )  # of the last backward pass, kept ready
    one: torch.Tensor = field(default_factory=lambda: torch.ones(()))


@dataclass(kw_only=True)
class Training:
    """Everything that an optimizer step needs and changes. `step` counts global batches consumed, skipped ones too."""

    group: Group
    control: Control
    strategy: Strategy
    model: nn.Module
    objectives: list[ObjectiveState]
    statistics: RunningStatistics
    plan: BatchPlan
    forward_key: int  # from which every forward pass's draws follow
    grad_clip: float = 0.0
    average: WeightAverage | None = None
    step: int = 0
    skipped: int = 0
    rounds: int = 0  # micro-batches of the rank that has most, where ranks run in lockstep
    tuned: list[str] = field(default_factory=list)  # defaults for speed that took effect
    notes: list[str] = field(
        default_factory=list
    )  # what wrapping found that the user should read at start
    copied: "torch.cuda.Event | None" = (
        None  # of a snapshot: the optimizer may change the weights only after it
    )
    base_sha256: str = ""  # of the frozen weights, if checkpoints leave them out
    checkpoints: Checkpointer | None = None
    suspect: "tuple[RankBatch, StepSums, torch.Tensor] | None" = (
        None  # a deferred step that the host has not seen yet
    )

    def settle(self) -> None:
        """After the first step of a life: shorter timeouts, and room for the first save. Every rank calls it."""
        self.group.settle()
        if self.checkpoints is not None:
            self.checkpoints.prepare()


@dataclass(slots=True)
class StepSums:
    """What a step leaves for the records: each micro-batch's sums, still on the device, rates, and the gradient norm if it was taken."""

    first: int = 0  # this rank's first micro-batch in the global batch
    size: int = 1  # this rank's micro-batches
    parts: list[tuple[str, Sums]] = field(default_factory=list)  # objective by objective
    grad_norms: dict[str, torch.Tensor] = field(default_factory=dict)
    rates: dict[str, list[Any]] = field(
        default_factory=dict
    )  # of each objective's parameter groups, as the step used them

    def totals(self, device: torch.device) -> Totals:
        """Returns this rank's sums by name, in float64, a row each micro-batch."""
        totals = Totals(device)
        for i in range(self.size):
            totals.add(
                {
                    prefix + name: pair
                    for prefix, sums in self.parts[i :: self.size]
                    for name, pair in sums.items()
                }
            )
        return totals
