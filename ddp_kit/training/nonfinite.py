"""Why a step is not finite: which rank, which micro-batch, which samples, which parameters.

All ranks come here at the same step, having seen it in the reduced gradients. Training never goes
on with weights that a bad step has changed.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from ddp_kit.data.rank_batch import RankBatch
from ddp_kit.data.reader import MicroBatch
from ddp_kit.distributed.collectives import from_rank, gather_bytes, sum_over_ranks
from ddp_kit.errors import DdpKitError, NonFiniteError, some
from ddp_kit.io.logs import logger
from ddp_kit.strategies.precision import MOST_AT_FLOOR
from ddp_kit.training.alone import computed_alone
from ddp_kit.training.bad_steps import Fault
from ddp_kit.training.loss_count import EMPTY
from ddp_kit.training.state import ObjectiveState, StepSums, Training

MOST_LISTED = 16  # samples that an error names


def look_back(training: Training) -> None:
    """Reads, one step later, whether a deferred step was applied. Every rank calls it.

    The flag stays set, so nothing was applied since.

    Raises: NonFiniteError on every rank if it was not.
    """
    if training.suspect is None:
        return
    batch, sums, seen = training.suspect
    if seen.is_pinned():
        # The copy may still be under way, but it is of the step before: long done, or nearly.
        torch.cuda.current_stream().synchronize()
    training.suspect = None
    training.group.unseen.pop(id(training), None)
    if bool(seen):
        fault = fault_of(training, training.objectives[0], batch, sums)
        if fault is not None:
            training.bad_steps.drop(fault)


def fault_of(
    training: Training, objective: ObjectiveState, batch: RankBatch, sums: StepSums
) -> Fault | None:
    """Puts the buffers back and finds out why a step is not finite.

    All ranks are here at the same step.

    Returns: the fault, with rank and samples, or parameters; None if fp16 gradients only
        overflowed.
    Raises:
        NonFiniteError: fp16 gradients stay not finite at the smallest loss scale.
        DdpKitError: the count over the whole global batch is 0.
    """
    training.forward_state.restore()
    step = batch.step + 1
    own = _first_bad_micro_batch(batch, sums)
    if own is not None:
        training.control_packet.name_culprit(step)
    decision = training.control_packet.exchange()
    # The next bad step is another one's.
    training.control_packet.name_culprit(-1)
    if decision.culprit_rank >= 0:
        content = from_rank(training.group, json.dumps(own).encode(), source=decision.culprit_rank)
        return _fault_of_loss(
            training, objective, step, rank=decision.culprit_rank, found=json.loads(content)
        )
    if not sum_over_ranks(training.group, _own_count(objective, sums)):
        raise DdpKitError(f"step {step}: {EMPTY}.")
    scale = objective.scale
    if scale.is_on and not scale.is_hopeless:
        return None
    bad = _bad_parameters(training, objective)
    if scale.is_on:
        raise NonFiniteError(
            f"the gradients of the last {MOST_AT_FLOOR} steps, up to step {step}, "
            f"are not finite at the smallest loss scale ({scale.scale:g}), in {some(bad)}: "
            f"it is not fp16 that overflows. {what_was_applied(training, objective)} "
            "A square root or logarithm of 0 does this; "
            "--precision bf16 or fp32 ends at the first such step."
        )
    return _fault_of_gradient(training, objective, batch, bad)


def _fault_of_loss(
    training: Training,
    objective: ObjectiveState,
    step: int,
    *,
    rank: int,
    found: Mapping[str, Any],
) -> Fault:
    samples = listed(found["samples"])
    return Fault(
        kind="not_finite",
        step=step,
        found=(
            f"loss {found['value']} on rank {rank}, micro-batch {found['micro_batch']}, "
            f"samples {samples}"
        ),
        message=(
            f"the loss of step {step} is not finite on rank {rank}, samples {samples}. "
            f"{what_was_applied(training, objective)} "
            "Look at these samples, or lower the learning rate, or type --grad-clip 1."
        ),
        rank=rank,
        about=found,
    )


def _fault_of_gradient(
    training: Training, objective: ObjectiveState, batch: RankBatch, bad: list[str]
) -> Fault:
    """Returns the fault of a gradient that is not finite though the loss is."""
    step = batch.step + 1
    rank, found = _source_of_gradient(training, objective, batch)
    come_from = ""
    if rank >= 0:
        samples = listed(found["samples"])
        where = f"on rank {rank}, micro-batch {found['micro_batch']}, samples {samples}"
        come_from = f"It comes from {where.removeprefix('on ')}. "
    elif training.strategy.shards is None:
        where = "and no micro-batch has it when it is computed again"
    else:
        where = "and where it comes from is not known where ranks hold parts of the weights"
    return Fault(
        kind="not_finite",
        step=step,
        found=f"gradient of {some(bad)} though the loss is finite, {where}",
        message=(
            f"the gradient of step {step} is not finite though the loss is, in {some(bad)}. "
            f"{come_from}{what_was_applied(training, objective)} "
            "A square root or logarithm of 0 does this; or lower the learning rate."
        ),
        rank=rank,
        about={"parameters": bad, **found},
    )


def _source_of_gradient(
    training: Training, objective: ObjectiveState, batch: RankBatch
) -> tuple[int, Mapping[str, Any]]:
    """Returns the first rank of which a micro-batch has a bad gradient by itself, and which one.

    The sum over ranks no longer tells. Rank -1: none has, or ranks hold parts of the weights.
    """
    own = None
    if training.strategy.shards is None:
        own = _first_bad_gradient(training, objective, batch)
    rows = gather_bytes(training.group, json.dumps(own).encode())
    for rank, row in enumerate(rows):
        found = json.loads(row)
        if found is not None:
            return rank, found
    return -1, {}


def _first_bad_gradient(
    training: Training, objective: ObjectiveState, batch: RankBatch
) -> Mapping[str, Any] | None:
    """Computes all of this rank's micro-batches, as the other ranks do: a forward pass may speak to
    them."""
    bad: Mapping[str, Any] | None = None
    for micro_batch in batch.micro_batches:
        try:
            alone = computed_alone(training, objective, micro_batch)
        except Exception as error:
            # Whatever a model raises that cannot be run so: what is known is told without it.
            logger.warning("micro-batches could not be computed by themselves: %s", error)
            return None
        found = [gradient for gradient in alone.gradients if gradient is not None]
        is_finite = all(bool(torch.isfinite(gradient).all()) for gradient in found)
        if bad is None and not is_finite:
            bad = _told(micro_batch)
    return bad


def _told(micro_batch: MicroBatch) -> dict[str, Any]:
    """Returns what is said of a micro-batch."""
    request = micro_batch.request
    return {"micro_batch": request.micro_batch, "samples": request.indices.tolist()}


def _own_count(objective: ObjectiveState, sums: StepSums) -> torch.Tensor:
    """Returns this rank's part of the loss's count."""
    count = sum(part["loss"][1] for name, part in sums.parts if name == objective.name)
    return torch.tensor(float(count), dtype=torch.float64)


def _bad_parameters(training: Training, objective: ObjectiveState) -> list[str]:
    """Returns the names of the parameters whose gradient is not finite, on any rank where ranks
    hold parts."""
    names = {id(parameter): name for name, parameter in training.model.named_parameters()}
    own = []
    for parameter in objective.parameters:
        parts = training.strategy.gradients([parameter])
        if not all(bool(torch.isfinite(part).all()) for part in parts):
            own.append(names[id(parameter)])
    bad: set[str] = set()
    for row in gather_bytes(training.group, "\n".join(own).encode()):
        bad.update(row.decode().split("\n"))
    return [name for name in names.values() if name in bad]


def what_was_applied(training: Training, objective: ObjectiveState) -> str:
    """Objectives run in order, and one may need what those before it have changed: their steps
    cannot be taken back."""
    before = []
    for other in training.objectives:
        if other is objective:
            break
        before.append(other.name.rstrip("/"))
    if not before:
        return "The step was not applied."
    return (
        f"The step of {objective.name.rstrip('/')} was not applied; that of {', '.join(before)}, "
        "which came before it, was."
    )


def _first_bad_micro_batch(batch: RankBatch, sums: StepSums) -> dict[str, Any] | None:
    """Returns what is said of this rank's first micro-batch whose loss is not finite."""
    for i, (_, part) in enumerate(sums.parts):
        total = part["loss"][0]
        if isinstance(total, torch.Tensor) and not bool(torch.isfinite(total)):
            micro_batch = batch.micro_batches[i % len(batch.micro_batches)]
            return {"value": str(float(total)), **_told(micro_batch)}
    return None


@contextmanager
def samples_named(micro_batch: MicroBatch, where: str) -> Iterator[None]:
    """Adds to an error of the user's code which samples it was working on."""
    try:
        yield
    except Exception as error:
        error.add_note(
            f"in the forward pass {where}, samples {listed(micro_batch.request.indices)}"
        )
        raise


def listed(indices: Any) -> str:
    """Returns the first sample indices as text, and how many more there are."""
    shown = ", ".join(str(int(index)) for index in indices[:MOST_LISTED])
    num_more = len(indices) - MOST_LISTED
    if num_more > 0:
        return f"{shown} and {num_more} more"
    return shown
