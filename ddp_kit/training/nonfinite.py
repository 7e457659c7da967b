"""Whether a step may be applied, and whose fault it is if not.

Owns: the check of the reduced gradients, which are equal on all ranks, and naming rank, step and samples of a bad loss.
Refuses: going on with weights that a bad step has changed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from typing import Any

import numpy as np
import torch

from ddp_kit.data.loader import RankBatch
from ddp_kit.data.reader import MicroBatch
from ddp_kit.distributed.collectives import from_rank, gather_bytes, sum_over_ranks
from ddp_kit.errors import DdpKitError, NonFiniteError, some
from ddp_kit.training.loss_count import EMPTY
from ddp_kit.training.state import ObjectiveState, StepSums, Training


def find_non_finite(
    gradients: list[torch.Tensor], found: torch.Tensor, *, one: torch.Tensor, is_mixed: bool
) -> None:
    """Sets `found` to 1 if a gradient is not finite: GradScaler's kernel, multiplying by `one`; `is_mixed`: they have several dtypes, or
    complex ones, which the kernel does not take.
    """
    if not is_mixed:
        torch._amp_foreach_non_finite_check_and_unscale_(gradients, found, one)
        return
    for gradient in gradients:
        if gradient.is_complex():
            gradient = torch.view_as_real(gradient.resolve_conj())
        torch._amp_foreach_non_finite_check_and_unscale_([gradient], found, one)


def look_back(training: Training) -> None:
    """Reads, one step later, whether a deferred step was applied; the flag stays set, so nothing was applied since."""
    if training.suspect is None:
        return
    batch, sums, seen = training.suspect
    if seen.is_pinned():  # a copy that may still be under way
        torch.cuda.current_stream().synchronize()  # the step before: long done, or nearly
    training.suspect = None
    training.group.unseen.pop(id(training), None)
    if bool(seen):
        judge(training, training.objectives[0], batch, sums)


def judge(training: Training, objective: ObjectiveState, batch: RankBatch, sums: StepSums) -> None:
    """Puts the buffers back and finds out why a step is not finite; all ranks are here at the same step. Returns if fp16 gradients
    only overflowed.
    """
    training.statistics.restore()
    step, verdict = batch.step + 1, _not_applied(training, objective)
    own = _first_bad(batch, sums)
    if own is not None:
        training.control.name_culprit(step)
    decision = training.control.exchange()
    if decision.culprit_rank >= 0:
        samples = np.frombuffer(
            from_rank(training.group, own or b"", source=decision.culprit_rank), dtype=np.int64
        )
        raise NonFiniteError(
            f"the loss of step {decision.culprit_step} is not finite on rank {decision.culprit_rank}, samples {listed(samples)}. "
            f"{verdict} Look at these samples, or lower the learning rate, or type --grad-clip 1."
        )
    count = torch.tensor(
        float(sum(part["loss"][1] for name, part in sums.parts if name == objective.name)),
        dtype=torch.float64,
    )
    if not sum_over_ranks(training.group, count):
        raise DdpKitError(f"step {step}: {EMPTY}.")
    if objective.scale.is_on:
        return
    bad = _bad_gradients(training, objective)
    raise NonFiniteError(
        f"the gradient of step {step} is not finite though the loss is, in {some(bad)}. "
        f"{verdict} A square root or logarithm of 0 does this; or lower the learning rate."
    )


def _bad_gradients(training: Training, objective: ObjectiveState) -> list[str]:
    """Returns the names of the parameters whose gradient is not finite, on any rank where ranks hold parts."""
    names = {id(parameter): name for name, parameter in training.model.named_parameters()}
    parts = {names[id(p)]: training.strategy.gradients([p]) for p in objective.parameters}
    own = [
        name
        for name, found in parts.items()
        if not all(bool(torch.isfinite(part).all()) for part in found)
    ]
    rows = gather_bytes(training.group, "\n".join(own).encode())
    return [
        name for name in names.values() if any(name in row.decode().split("\n") for row in rows)
    ]


def _not_applied(training: Training, objective: ObjectiveState) -> str:
    """Objectives run in order, and one may need what those before it have changed: their steps cannot be taken back."""
    before = [
        other.name.rstrip("/")
        for other in takewhile(lambda other: other is not objective, training.objectives)
    ]
    if not before:
        return "The step was not applied."
    return f"The step of {objective.name.rstrip('/')} was not applied; that of {', '.join(before)}, which came before it, was."


def _first_bad(batch: RankBatch, sums: StepSums) -> bytes | None:
    """Returns the sample indices, as bytes, of this rank's first micro-batch whose loss is not finite."""
    for i, (_, part) in enumerate(sums.parts):
        total = part["loss"][0]
        if isinstance(total, torch.Tensor) and not bool(torch.isfinite(total)):
            return (
                batch.micro_batches[i % len(batch.micro_batches)]
                .request.indices.astype(np.int64)
                .tobytes()
            )
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
    shown = ", ".join(str(int(index)) for index in indices[:16])
    return f"{shown} and {len(indices) - 16} more" if len(indices) > 16 else shown
