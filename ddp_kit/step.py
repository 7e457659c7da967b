"""One optimizer step: a global batch in, changed weights out, the same on every rank.

Owns: accumulation, the division by the count, clipping, and applying the step or not.
Refuses: reading data, evaluating, logging. Nothing here waits for the device unless a line says so.

The gradient of a step is that of sum / count over the global batch. Each backward pass runs on total x divisor x scale / E, where E
is the count if it is known beforehand and an expected one (a power of two, so that it changes no bits) if it is not; then
gradients are multiplied once by E / N. Every rank decides from the reduced gradients, which are equal on all ranks, whether to
apply the step; a loss that is not finite makes its own gradients nan, so that no rank can miss it.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist

from ddp_kit.data.loader import RankBatch
from ddp_kit.errors import DdpKitError
from ddp_kit.finite import find_non_finite, judge, listed, look_back
from ddp_kit.preemption import StopFlag
from ddp_kit.seeding import seed_forward
from ddp_kit.training import ObjectiveState, StepSums, Sums, Training


def train_step(training: Training, batch: RankBatch) -> StepSums:
    """Runs one optimizer step of every objective on this rank's part of a global batch. Every rank calls it.

    Raises: NonFiniteError on every rank, with the weights as they were before the step, if a loss or gradient is not finite.
    """
    sums = StepSums()
    look_back(training)
    for objective in training.objectives:
        for parameter in objective.frozen:
            parameter.requires_grad_(False)
        try:
            is_applied = _objective_step(training, objective, batch, sums)
        finally:
            for parameter in objective.frozen:
                parameter.requires_grad_(True)
        if not is_applied:
            training.skipped += 1
            objective.optimizer._opt_called = True  # type: ignore[attr-defined]  # else torch's schedulers warn of a step never taken
        if objective.scheduler is not None:
            objective.scheduler.step()
    if training.average is not None:
        training.average.update()
    training.step += 1
    return sums


def _objective_step(training: Training, objective: ObjectiveState, batch: RankBatch, sums: StepSums) -> bool:
    objective.optimizer.zero_grad(set_to_none=True)
    statistics, last = training.statistics, len(batch.micro_batches) - 1
    known = _known_count(training, objective, batch)
    counted: list[torch.Tensor] = []
    work: dist.Work | None = None
    weight = training.strategy.divisor * objective.scale.scale
    statistics.begin()
    for i, micro_batch in enumerate(batch.micro_batches):
        with nullcontext() if i == last else training.strategy.no_sync(objective.call):
            seed_forward(training.seed, training.step, micro_batch.request.micro_batch, device=training.group.device)
            statistics.rewind()
            total, count, metrics = _forward(objective, micro_batch.batch, batch, i)
            statistics.capture()
            if i == 0:
                weight /= known() if known is not None else objective.expected
            if known is None or isinstance(count, torch.Tensor):
                counted.append(_checked_count(count, objective, total))
            elif training.count is None and count != objective.per_sample * micro_batch.size:
                raise DdpKitError(_count_changed(objective, count, micro_batch.size))
            if i == last:
                statistics.launch()
                if known is None:
                    counted, work = _launch_count(training, counted)
            total.backward(gradient=total.detach() * 0 + weight)  # nan where the loss is not finite: inf x 0, nan x 0
        sums.parts.append((objective.name, {"loss": (total.detach(), count), **metrics}))
    statistics.finish()
    factor: float | torch.Tensor = 1 / objective.scale.scale
    if known is None:
        if work is not None:
            work.wait()
        factor = factor * objective.expected / counted[0]
    return _apply(training, objective, batch, sums, factor)


def _forward(objective: ObjectiveState, batch: Any, whole: RankBatch, i: int) -> tuple[torch.Tensor, int | torch.Tensor, Sums]:
    try:
        result: tuple[torch.Tensor, int | torch.Tensor, Sums] = objective.call(batch)
    except Exception as error:
        request = whole.micro_batches[i].request
        error.add_note(
            f"in the forward pass of step {whole.step + 1}, micro-batch {request.micro_batch}, samples {listed(request.indices)}"
        )
        raise
    return result


def _known_count(training: Training, objective: ObjectiveState, batch: RankBatch) -> Callable[[], float] | None:
    """Returns a function that gives the global batch's count, or None if only the losses will tell."""
    if training.count is not None:
        own = torch.tensor(float(sum(training.count(micro_batch.batch) for micro_batch in batch.micro_batches)), dtype=torch.float64)
        control = training.group.control
        work = None if control is None else dist.all_reduce(own, group=control, async_op=True)

        def arrived() -> float:
            if work is not None:
                work.wait()
            if not own:
                raise DdpKitError(f"step {training.step + 1}: the count over the whole global batch is 0, so there is no mean to take.")
            return float(own)

        return arrived
    if objective.per_sample:
        return lambda: objective.per_sample * training.plan.global_batch
    return None


def _checked_count(count: int | torch.Tensor, objective: ObjectiveState, total: torch.Tensor) -> torch.Tensor:
    if objective.per_sample and not isinstance(count, torch.Tensor):
        return torch.tensor(float(count), dtype=torch.float64, device=total.device)
    return torch.as_tensor(count, dtype=torch.float64, device=total.device).detach()


def _count_changed(objective: ObjectiveState, count: int, size: int) -> str:
    return (
        f"the loss's count is the int {count} for {size} samples, where it was {objective.per_sample} for each sample before. "
        "A count that varies must be a tensor: LossSum(total, torch.tensor(count)), or be known before the forward pass: Data(count=...)."
    )


def _launch_count(training: Training, counted: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], dist.Work | None]:
    """Starts the sum of the counts over ranks, before the last backward pass."""
    own = torch.stack(list(counted)).sum()
    if training.group.training is None:
        return [own], None
    return [own], dist.all_reduce(own, group=training.group.training, async_op=True)


def _apply(training: Training, objective: ObjectiveState, batch: RankBatch, sums: StepSums, factor: float | torch.Tensor) -> bool:
    """Scales, checks and clips the reduced gradients and steps the optimizer. Returns whether the step was applied."""
    gradients = [parameter.grad for parameter in objective.parameters if parameter.grad is not None]
    if isinstance(factor, torch.Tensor) or factor != 1:
        torch._foreach_mul_(gradients, factor)
    found = objective.found_inf
    if not objective.is_deferred:
        found.zero_()
    find_non_finite(gradients, found)
    if training.grad_clip:
        norm = torch.nn.utils.get_total_norm(gradients)
        sums.grad_norms[objective.name] = norm
        torch.nn.utils.clip_grads_with_norm_(objective.parameters, training.grad_clip, norm)
    if objective.is_deferred:
        objective.optimizer.found_inf = found  # type: ignore[attr-defined]  # fused optimizers read it, as GradScaler has it
        objective.optimizer.step()
        seen = torch.empty_like(found, device="cpu", pin_memory=True)
        seen.copy_(found, non_blocking=True)
        training.suspect = (batch, sums, seen)
        return True
    is_bad = bool(found)  # host-device synchronisation on CUDA
    objective.scale.update(overflowed=is_bad)
    if is_bad:
        judge(training, objective, batch, sums)
        training.statistics.restore()
        return False
    objective.optimizer.step()
    return True


def should_stop(training: Training, stop: StopFlag) -> bool:
    """Whether all ranks agreed to stop after a signal on any of them. Every rank of a loop of its own calls it after each step."""
    stop.deferring = True
    decision = training.control.boundary(training.step, signal=stop.signal)
    return decision is not None and decision.signal != 0
