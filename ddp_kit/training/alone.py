"""A micro-batch's loss and gradients by themselves, without a sum over ranks, leaving no trace.

It is for looking closer: which rank a bad gradient comes from, and whether the same pass gives the
same bits twice. A strategy that splits the weights cannot have it.
"""

from dataclasses import dataclass

import torch

from ddp_kit.data.reader import MicroBatch
from ddp_kit.data.seeding import seed_forward
from ddp_kit.model_state.untouched import untouched
from ddp_kit.training.state import ObjectiveState, Training


@dataclass(frozen=True)
class Alone:
    """What a pass gave: the loss's total, and a gradient of each parameter (None: not used)."""

    total: torch.Tensor
    gradients: tuple[torch.Tensor | None, ...]


def computed_alone(training: Training, objective: ObjectiveState, batch: MicroBatch) -> Alone:
    """Runs a micro-batch forward and backward, with the draws that it has in its step.

    Parameters' own gradients are left alone, so that nothing is summed; buffers, attributes and
    generators are put back.
    """
    with untouched(training.model, has_attribute=training.forward_state.has_attribute):
        seed_forward(
            objective.forward_key,
            batch.request.step,
            batch.request.micro_batch,
            device=training.group.device,
        )
        total, _, _ = objective.bare(batch.batch)
        weight = torch.full_like(total, objective.scale.scale / batch.size)
        gradients = torch.autograd.grad(
            total, objective.parameters, grad_outputs=weight, allow_unused=True
        )
        return Alone(total.detach(), gradients)
