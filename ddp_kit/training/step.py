"""One optimizer step: a global batch in, changed weights out, the same on every rank.

The gradient of a step is that of sum / count over the global batch (`loss_count`). Each backward
pass runs on the sum divided by that count or an expected one, times what the strategy will divide
by and the scale of fp16. Every rank decides from the reduced gradients, which are equal on all
ranks, whether to apply the step; a loss that is not finite makes a gradient nan, also where it
sends none of its own, so that no rank can miss it.

Nothing here waits for the device unless a line says so.
"""

import math

import torch

from ddp_kit.data.rank_batch import RankBatch
from ddp_kit.data.reader import MicroBatch
from ddp_kit.data.seeding import seed_forward
from ddp_kit.distributed.collectives import anywhere, over_shards
from ddp_kit.distributed.pulse import Phase
from ddp_kit.metrics import Sums
from ddp_kit.stopping.signals import StopFlag
from ddp_kit.training.finite_check import find_non_finite, mark_added
from ddp_kit.training.nonfinite import listed, look_back
from ddp_kit.training.state import ObjectiveState, StepSums, Training
from ddp_kit.training.verdict import may_be_applied

OPTIMIZER = -1  # stands for the micro-batch in the keys of an optimizer's draws


def train_step(training: Training, batch: RankBatch) -> StepSums:
    """Runs one optimizer step of every objective on this rank's part of a global batch.

    Every rank calls it.

    Returns: the sums of each micro-batch's losses and metrics, gradient norms and learning rates.

    Raises: NonFiniteError on every rank, with the weights as they were before the step, if a loss
        or gradient is not finite and nothing else was asked for; RollBack if the run is to go back.
    """
    sums = StepSums(first=batch.micro_batches[0].request.micro_batch, size=len(batch.micro_batches))
    look_back(training)
    training.flags.require()
    if training.freezing is not None:
        training.freezing.enter(batch.epoch, objectives=training.objectives, flags=training.flags)
    if training.step + 1 in training.bad_steps.left_out:
        sums.is_dropped = True
        for objective in training.objectives:
            _end_objective(objective, is_applied=False)
        _end(training, is_whole=False)
        return sums
    training.forward_state.begin_step()
    is_whole = True
    for number, objective in enumerate(training.objectives):
        # The rates of this step: the scheduler moves on below.
        groups = objective.optimizer.param_groups
        sums.rates[objective.name] = [group["lr"] for group in groups]
        for parameter in objective.frozen:
            parameter.requires_grad_(False)
        try:
            is_applied = _objective_step(training, objective, batch, sums, number=number)
        finally:
            for parameter in objective.frozen:
                parameter.requires_grad_(True)
        _end_objective(objective, is_applied=is_applied)
        is_whole = is_whole and is_applied
    _end(training, is_whole=is_whole)
    return sums


def _end_objective(objective: ObjectiveState, *, is_applied: bool) -> None:
    """Moves the schedule on."""
    if not is_applied:
        # Else torch's schedulers warn of a step never taken.
        objective.optimizer._opt_called = True  # type: ignore[attr-defined]
    if objective.scheduler is not None:
        objective.scheduler.step()


def _end(training: Training, *, is_whole: bool) -> None:
    """Counts the step."""
    if not is_whole:
        training.skipped += 1
    if training.average is not None:
        training.average.update()
    training.step += 1
    training.group.pulse.end_step()


def _objective_step(
    training: Training, objective: ObjectiveState, batch: RankBatch, sums: StepSums, *, number: int
) -> bool:
    """Runs forward and backward of each micro-batch, and applies the step. Returns whether it was
    applied. `number` is the objective's."""
    pulse = training.group.pulse
    for parameter in objective.parameters:
        parameter.grad = None
    if training.look_twice is not None:
        training.look_twice(objective, batch)
    strategy = training.strategy
    state = training.forward_state
    count = objective.count

    grad_scale, unscale = _scales(objective, divisor=strategy.divisor)
    count.begin(batch.micro_batches)
    state.begin()
    last = len(batch.micro_batches) - 1
    num_passes = max(training.rounds, last + 1)
    for i in range(num_passes):
        micro_batch = batch.micro_batches[min(i, last)]
        request = micro_batch.request
        pulse.begin_pass(number, left=num_passes - i)
        with strategy.micro_batch(objective.call, is_last=i == num_passes - 1):
            seed_forward(
                objective.forward_key,
                training.step,
                request.micro_batch,
                device=training.group.device,
            )
            state.rewind(request.micro_batch)
            total, own_count, metrics = _forward(objective, micro_batch, training.step)
            pulse.mark(Phase.BACKWARD)
            if i > last:
                # Others have one more, and gather weights with this rank: it repeats its last one,
                # for nothing.
                _backward(total, 0.0, objective)
                continue
            state.capture(request.micro_batch)
            count.take(own_count, size=micro_batch.size)
            if i == last:
                count.launch()
                state.launch()
            _backward(total, grad_scale / count.divisor(), objective)
        sums.parts.append((objective.name, {"loss": (total.detach(), own_count), **metrics}))

    training.flags.require(objective.name)
    # Read in the order of the launches, so that none is waited for while a failed one is unread.
    pulse.mark(Phase.REDUCE)
    factor = count.factor() * unscale
    state.finish()
    pulse.mark(Phase.OPTIMIZER)
    return _apply(training, objective, batch, sums, factor)


def _scales(objective: ObjectiveState, *, divisor: float) -> tuple[float, float]:
    """Returns what a loss is multiplied by before backward, and its gradients after it."""
    if not objective.scale.is_on:
        return float(divisor), 1.0
    # The divisor waits until after backward: what overflows must not depend on the number of ranks.
    scale = objective.scale.scale
    return scale, float(divisor) / scale


def _forward(
    objective: ObjectiveState, micro_batch: MicroBatch, step: int
) -> tuple[torch.Tensor, int | torch.Tensor, Sums]:
    """Returns the loss's (total, count, metrics). An error of it is told its samples.

    As `samples_named` does, without the microseconds that a context manager takes of each step.
    """
    try:
        result: tuple[torch.Tensor, int | torch.Tensor, Sums] = objective.call(micro_batch.batch)
    except Exception as error:
        request = micro_batch.request
        error.add_note(
            f"in the forward pass of step {step + 1}, micro-batch {request.micro_batch}, "
            f"samples {listed(request.indices)}"
        )
        raise
    return result


def _backward(total: torch.Tensor, weight: float, objective: ObjectiveState) -> None:
    """Adds the gradients of total x weight.

    Of a total that is not finite they are nan, which no rank can then miss.
    """
    if total.is_cuda:
        # inf x 0 and nan x 0 are nan: the host need not wait for the value.
        zero = total.detach() * 0
        # -0.0 is what changes no bit of what it is added to.
        with mark_added(total, -zero.abs()):
            total.backward(gradient=zero + weight)
        return
    if not math.isfinite(total.item()):
        with mark_added(total, torch.full_like(total, math.nan)):
            total.backward(gradient=torch.full_like(total, math.nan))
        return
    kept_weight, kept_tensor = objective.weight
    if weight != kept_weight or total.dtype != kept_tensor.dtype:
        kept_tensor = torch.full((), weight, dtype=total.dtype)
        objective.weight = (weight, kept_tensor)
    total.backward(gradient=kept_tensor)


def _apply(
    training: Training,
    objective: ObjectiveState,
    batch: RankBatch,
    sums: StepSums,
    factor: float | torch.Tensor,
) -> bool:
    """Scales, checks and clips the reduced gradients and steps the optimizer. Returns whether the
    step was applied."""
    gradients = training.strategy.gradients(objective.parameters)
    shards = training.strategy.shards
    found = objective.found_inf
    if isinstance(factor, torch.Tensor):
        torch._foreach_mul_(gradients, factor.to(found.device))
    elif factor != 1:
        torch._foreach_mul_(gradients, factor)
    if training.copied is not None:
        # A snapshot still reads the weights: the device waits, the host does not.
        torch.cuda.current_stream().wait_event(training.copied)
        training.copied = None
    find_non_finite(gradients, found, one=objective.one, is_mixed=objective.is_mixed)
    anywhere(found, shards)
    if training.grad_clip or training.bad_steps.spikes is not None:
        norm = over_shards(torch.nn.utils.get_total_norm(gradients), shards)
        sums.grad_norms[objective.name] = norm
        if training.grad_clip:
            _clip(gradients, training.grad_clip, norm=norm)
    if objective.may_draw:
        # Each rank's generators stand where its own last micro-batch has left them.
        seed_forward(objective.forward_key, training.step, OPTIMIZER, device=training.group.device)
    if objective.is_deferred:
        _step_deferred(training, objective, batch, sums)
        return True

    if not may_be_applied(training, objective, batch, sums):
        return False
    _step_optimizer(training, objective)
    # As torch's schedulers note a step.
    objective.optimizer._opt_called = True  # type: ignore[attr-defined]
    return True


def _step_optimizer(training: Training, objective: ObjectiveState) -> None:
    if training.freezing is None:
        objective.optimizer_view.step()
        return
    with training.freezing.watched(objective):
        objective.optimizer_view.step()


def _clip(gradients: list[torch.Tensor], limit: float, *, norm: torch.Tensor) -> None:
    """Scales gradients of a norm over all parameters to a norm of `limit`, at most."""
    coefficient = torch.clamp(limit / (norm + 1e-6), max=1.0)
    # A nan would make all gradients bad where one is.
    torch._foreach_mul_(gradients, coefficient.nan_to_num_(nan=1.0))


def _step_deferred(
    training: Training, objective: ObjectiveState, batch: RankBatch, sums: StepSums
) -> None:
    """Steps an optimizer that reads `found_inf` on the device; the host reads it one step later."""
    found = objective.found_inf
    # Fused optimizers read it, as GradScaler has it.
    objective.optimizer.found_inf = found  # type: ignore[attr-defined]
    _step_optimizer(training, objective)
    seen = torch.empty_like(found, device="cpu", pin_memory=found.is_cuda)
    seen.copy_(found, non_blocking=True)
    training.suspect = (batch, sums, seen)
    # Should the loop end here.
    training.group.unseen[id(training)] = lambda: look_back(training)


def should_stop(training: Training, stop: StopFlag) -> bool:
    """Whether all ranks agreed to stop after a signal on any of them.

    Every rank of a loop of its own calls it after each step.

    Raises: NonFiniteError on every rank, before it says so, if the last step turns out not to have
        been applied.
    """
    stop.deferring = True
    if not training.control_packet.boundary(stop=stop.stop).stop:
        return False
    look_back(training)
    return True
