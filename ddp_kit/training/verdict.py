"""Whether a step may be applied, from the reduced gradients, which are the same on all ranks.

So is every number here, and no rank asks another unless the step is bad.
"""

from dataclasses import replace

from ddp_kit.data.rank_batch import RankBatch
from ddp_kit.training.bad_steps import Fault
from ddp_kit.training.nonfinite import fault_of, what_was_applied
from ddp_kit.training.state import ObjectiveState, StepSums, Training


def may_be_applied(
    training: Training, objective: ObjectiveState, batch: RankBatch, sums: StepSums
) -> bool:
    """Whether a step may be applied: the same on all ranks. If not, the buffers are put back.

    Raises: what `BadSteps.drop` and `fault_of` raise.
    """
    is_bad = bool(objective.found_inf)  # host-device synchronisation on CUDA
    scale = objective.scale
    if scale.is_on:
        objective.scale = replace(scale)
        objective.scale.update(overflowed=is_bad)
    if is_bad:
        objective.found_inf.zero_()
        fault = fault_of(training, objective, batch, sums)
        if fault is None:
            return False
    else:
        fault = _spike(training, objective, batch, sums)
        if fault is None:
            return True
        training.forward_state.restore()
    # Of no overflow the loss scale learns nothing.
    objective.scale = scale
    training.bad_steps.drop(fault)
    sums.is_dropped = True
    return False


def _spike(
    training: Training, objective: ObjectiveState, batch: RankBatch, sums: StepSums
) -> Fault | None:
    """Returns the fault of a gradient whose norm is far above those before, if that is looked
    for."""
    if training.bad_steps.spikes is None:
        return None
    norm = float(sums.grad_norms[objective.name])
    spike = training.bad_steps.spikes.judge(objective.name, norm)
    if spike is None:
        return None
    window = training.bad_steps.spikes.window
    of = f" of {objective.name.rstrip('/')}" if objective.name else ""
    found = (
        f"gradient norm{of} {spike.norm:.4g}, {spike.z:.3g} robust deviations above "
        f"{spike.median:.4g}, the median of the last {window} steps"
    )
    return Fault(
        kind="spike",
        step=batch.step + 1,
        found=found,
        message=(
            f"SPIKE at step {batch.step + 1}: {found}; --spike-z is "
            f"{training.bad_steps.spikes.z:g}. {what_was_applied(training, objective)}"
        ),
        about={"norm": spike.norm, "median": spike.median, "z": spike.z},
    )
