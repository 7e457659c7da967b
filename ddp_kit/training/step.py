"""One optimizer step: a global batch in, changed weights out, the same on every rank.

Owns: accumulation, the division by the count, clipping, and applying the step or not.
Refuses: reading data, evaluating, logging. Nothing here waits for the device unless a line says so.

The gradient of a step is that of sum / count over the global batch (`counts`). Each backward pass runs on the sum divided by that
count or an expected one, times what the strategy will divide by and the scale of fp16. Every rank decides from the reduced
gradients, which are equal on all ranks, whether to apply the step; a loss that is not finite makes its own gradients nan, so that
no rank can miss it.
"""

import math

import torch

from ddp_kit.data.loader import RankBatch
from ddp_kit.data.reader import MicroBatch
from ddp_kit.data.seeding import seed_forward
from ddp_kit.distributed.collectives import anywhere, over_shards
from ddp_kit.stopping.signals import StopFlag
from ddp_kit.strategies.optimizers import step_quietly
from ddp_kit.training.nonfinite import find_non_finite, judge, listed, look_back
from ddp_kit.training.state import ObjectiveState, StepSums, Sums, Training


def train_step(training: Training, batch: RankBatch) -> StepSums:
    """Runs one optimizer step of every objective on this rank's part of a global batch. Every rank calls it.

    Raises: NonFiniteError on every rank, with the weights as they were before the step, if a loss or gradient is not finite.
    """
    sums = StepSums(first=batch.micro_batches[0].request.micro_batch, size=len(batch.micro_batches))
    look_back(training)
    for objective in training.objectives:
        sums.rates[objective.name] = [
            group["lr"] for group in objective.optimizer.param_groups
        ]  # before the scheduler moves on
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


def _objective_step(
    training: Training, objective: ObjectiveState, batch: RankBatch, sums: StepSums
) -> bool:
    for parameter in objective.parameters:
        parameter.grad = None
    strategy, statistics, count, last = (
        training.strategy,
        training.statistics,
        objective.count,
        len(batch.micro_batches) - 1,
    )
    weight, left, rounds = float(strategy.divisor), 1.0, max(training.rounds, last + 1)
    if objective.scale.is_on:  # the divisor waits until after backward: what overflows must not depend on the number of ranks
        weight, left = objective.scale.scale, weight / objective.scale.scale
    count.begin(batch.micro_batches)
    statistics.begin()
    for i in range(rounds):
        micro_batch = batch.micro_batches[min(i, last)]
        with strategy.micro_batch(objective.call, is_last=i == rounds - 1):
            seed_forward(
                training.forward_key,
                training.step,
                micro_batch.request.micro_batch,
                device=training.group.device,
            )
            statistics.rewind()
            total, own_count, metrics = _forward(objective, micro_batch, training.step)
            if (
                i > last
            ):  # others have one more, and gather weights with this rank: it repeats its last one, for nothing
                _backward(total, 0.0, objective)
                continue
            statistics.capture()
            count.take(own_count, size=micro_batch.size)
            if i == last:
                count.launch()
                statistics.launch()
            _backward(total, weight / count.divisor(), objective)
        sums.parts.append((objective.name, {"loss": (total.detach(), own_count), **metrics}))
    factor = (
        count.factor() * left
    )  # read in the order of the launches, so that none is waited for while a failed one is unread
    statistics.finish()
    return _apply(training, objective, batch, sums, factor)


def _forward(
    objective: ObjectiveState, micro_batch: MicroBatch, step: int
) -> tuple[torch.Tensor, int | torch.Tensor, Sums]:
    try:
        result: tuple[torch.Tensor, int | torch.Tensor, Sums] = objective.call(micro_batch.batch)
    except Exception as error:
        request = micro_batch.request
        error.add_note(
            f"in the forward pass of step {step + 1}, micro-batch {request.micro_batch}, samples {listed(request.indices)}"
        )
        raise
    return result


def _backward(total: torch.Tensor, weight: float, objective: ObjectiveState) -> None:
    """Adds the gradients of total x weight; of a total that is not finite they are nan, which no rank can then miss."""
    if total.is_cuda:
        total.backward(
            gradient=total.detach() * 0 + weight
        )  # inf x 0 and nan x 0 are nan; no host wait
        return
    if not math.isfinite(total.item()):
        weight = math.nan
    if weight != objective.weight[0] or total.dtype != objective.weight[1].dtype:
        objective.weight = weight, torch.full((), weight, dtype=total.dtype)
    total.backward(gradient=objective.weight[1])


def _apply(
    training: Training,
    objective: ObjectiveState,
    batch: RankBatch,
    sums: StepSums,
    factor: float | torch.Tensor,
) -> bool:
    """Scales, checks and clips the reduced gradients and steps the optimizer. Returns whether the step was applied."""
    gradients, shards = training.strategy.gradients(objective.parameters), training.strategy.shards
    if isinstance(factor, torch.Tensor) or factor != 1:
        torch._foreach_mul_(
            gradients,
            factor.to(objective.found_inf.device) if isinstance(factor, torch.Tensor) else factor,
        )
    if (
        training.copied is not None
    ):  # a snapshot still reads the weights: the device waits, the host does not
        torch.cuda.current_stream().wait_event(training.copied)
        training.copied = None
    found = objective.found_inf
    find_non_finite(gradients, found, one=objective.one, is_mixed=objective.is_mixed)
    anywhere(found, shards)
    if training.grad_clip:
        norm = sums.grad_norms[objective.name] = over_shards(
            torch.nn.utils.get_total_norm(gradients), shards
        )
        coefficient = torch.clamp(training.grad_clip / (norm + 1e-6), max=1.0)
        torch._foreach_mul_(
            gradients, coefficient.nan_to_num_(nan=1.0)
        )  # else one bad gradient would make all of them bad
    if objective.is_deferred:
        objective.optimizer.found_inf = found  # type: ignore[attr-defined]  # fused optimizers read it, as GradScaler has it
        step_quietly(objective.optimizer)
        seen = torch.empty_like(found, device="cpu", pin_memory=found.is_cuda)
        seen.copy_(found, non_blocking=True)
        training.suspect = (batch, sums, seen)
        training.group.unseen[id(training)] = lambda: look_back(
            training
        )  # should the loop end here
        return True
    is_bad = bool(found)  # host-device synchronisation on CUDA
    objective.scale.update(overflowed=is_bad)
    if is_bad:
        found.zero_()
        judge(training, objective, batch, sums)
        return False
    if objective.step is None:
        step_quietly(objective.optimizer)
        return True
    objective.step()
    objective.optimizer._opt_called = True  # type: ignore[attr-defined]  # as torch's schedulers note a step
    return True


def should_stop(training: Training, stop: StopFlag) -> bool:
    """Whether all ranks agreed to stop after a signal on any of them. Every rank of a loop of its own calls it after each step.

    Raises: NonFiniteError on every rank, before it says so, if the last step turns out not to have been applied.
    """
    stop.deferring = True
    if not training.control.boundary(stop=stop.stop).stop:
        return False
    look_back(training)
    return True
