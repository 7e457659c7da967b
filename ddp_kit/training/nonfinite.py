"""Whether a step may be applied, and where the fault is if not.

The check is on the reduced gradients, which are equal on all ranks. Of a bad loss rank, step and
samples are named. Training never goes on with weights that a bad step has changed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.autograd.graph import Node

from ddp_kit.data.rank_batch import RankBatch
from ddp_kit.data.reader import MicroBatch
from ddp_kit.distributed.collectives import from_rank, gather_bytes, sum_over_ranks
from ddp_kit.errors import DdpKitError, NonFiniteError, some
from ddp_kit.strategies.precision import MOST_AT_FLOOR
from ddp_kit.training.loss_count import EMPTY
from ddp_kit.training.state import ObjectiveState, StepSums, Training

MOST_LISTED = 16  # samples that an error names


def find_non_finite(
    gradients: list[torch.Tensor], found: torch.Tensor, *, one: torch.Tensor, is_mixed: bool
) -> None:
    """Sets `found` to 1 if a gradient is not finite.

    It is GradScaler's kernel, multiplying by `one`. `is_mixed`: the gradients have several dtypes,
    or complex ones, which the kernel does not take.
    """
    if not is_mixed:
        torch._amp_foreach_non_finite_check_and_unscale_(gradients, found, one)
        return
    for gradient in gradients:
        if gradient.is_complex():
            gradient = torch.view_as_real(gradient.resolve_conj())
        torch._amp_foreach_non_finite_check_and_unscale_([gradient], found, one)


@contextmanager
def mark_added(total: torch.Tensor, mark: torch.Tensor) -> Iterator[None]:
    """Adds `mark` to the gradient of one parameter that a total depends on, during its backward.

    A total that is inf may send its parameters no gradient at all (a `where`, a clamp, a relu
    between), not even a nan: a nan that is added travels over ranks with the gradient.
    """
    node = _accumulation(total.grad_fn)
    if node is None:
        yield
        return

    def marked(gradients: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        gradient = gradients[0]
        # None where a function of the user's own gives none.
        return gradients if gradient is None else (gradient + mark.to(gradient.dtype),)

    handle = node.register_prehook(marked)
    try:
        yield
    finally:
        handle.remove()


def _accumulation(node: Node | None) -> Node | None:
    """Returns where the gradient of some parameter is added up, the nearest one in the graph."""
    waiting = [node]
    seen: set[Node] = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(getattr(node, "variable", None), nn.Parameter):
            return node
        waiting += [before for before, _ in node.next_functions]
    return None


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
        raise_unless_overflow(training, training.objectives[0], batch, sums)


def raise_unless_overflow(
    training: Training, objective: ObjectiveState, batch: RankBatch, sums: StepSums
) -> None:
    """Puts the buffers back and finds out why a step is not finite.

    All ranks are here at the same step. It returns if fp16 gradients only overflowed.

    Raises:
        NonFiniteError: the loss or gradient is not finite; with rank and samples, or parameters.
            Or fp16 gradients stay so at the smallest loss scale.
        DdpKitError: the count over the whole global batch is 0.
    """
    training.forward_state.restore()
    step = batch.step + 1
    what_was_applied = _what_was_applied(training, objective)
    own = _first_bad_samples(batch, sums)
    if own is not None:
        training.control_packet.name_culprit(step)
    decision = training.control_packet.exchange()
    if decision.culprit_rank >= 0:
        content = from_rank(training.group, own or b"", source=decision.culprit_rank)
        samples = np.frombuffer(content, dtype=np.int64)
        raise NonFiniteError(
            f"the loss of step {decision.culprit_step} is not finite on rank "
            f"{decision.culprit_rank}, samples {listed(samples)}. {what_was_applied} "
            "Look at these samples, or lower the learning rate, or type --grad-clip 1."
        )
    if not sum_over_ranks(training.group, _own_count(objective, sums)):
        raise DdpKitError(f"step {step}: {EMPTY}.")
    scale = objective.scale
    if scale.is_on and not scale.is_hopeless:
        return
    bad = _bad_parameters(training, objective)
    if scale.is_on:
        raise NonFiniteError(
            f"the gradients of the last {MOST_AT_FLOOR} steps, up to step {step}, "
            f"are not finite at the smallest loss scale ({scale.scale:g}), in {some(bad)}: "
            f"it is not fp16 that overflows. {what_was_applied} "
            "A square root or logarithm of 0 does this; "
            "--precision bf16 or fp32 ends at the first such step."
        )
    raise NonFiniteError(
        f"the gradient of step {step} is not finite though the loss is, in {some(bad)}. "
        f"{what_was_applied} A square root or logarithm of 0 does this; or lower the learning rate."
    )


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


def _what_was_applied(training: Training, objective: ObjectiveState) -> str:
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


def _first_bad_samples(batch: RankBatch, sums: StepSums) -> bytes | None:
    """Returns the sample indices, as bytes, of this rank's first micro-batch whose loss is not
    finite."""
    for i, (_, part) in enumerate(sums.parts):
        total = part["loss"][0]
        if isinstance(total, torch.Tensor) and not bool(torch.isfinite(total)):
            micro_batch = batch.micro_batches[i % len(batch.micro_batches)]
            return micro_batch.request.indices.astype(np.int64).tobytes()
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
