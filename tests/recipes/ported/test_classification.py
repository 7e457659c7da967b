"""recipes/ported/classification.py has the loss curve, the averaged weights and the running statistics of a bare loop."""

import pytest
import torch
from ported import Program, assert_equal
from torch.nn.functional import cross_entropy, one_hot

from ddp_kit import schedules
from ddp_kit.distributed.process_group import Group

SMALL = {"global_batch": 24, "micro_batch": 6, "width": 4, "epochs": 0, "ema": 0.8}


def bare(program: Program) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Micro-batches that BatchNorm and mixup see as they are; statistics are the mean of what each makes of them."""
    model = program.model()
    named = dict(model.named_parameters())
    norms = [named[name] for name in named if name[:2] in ("1.", "4.", "7.")]
    others = [named[name] for name in named if name[:2] not in ("1.", "4.", "7.")]
    assert len(norms) == 6
    groups = [{"params": others, "weight_decay": 2e-4}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)
    scheduler = schedules.warmup_cosine(optimizer, program.settings.max_steps)
    kept = named | {name: one for name, one in model.named_buffers() if "running" in name}
    average = {name: tensor.detach().clone() for name, tensor in kept.items()}
    losses = []
    for step in range(program.settings.max_steps):
        optimizer.zero_grad()
        whole = 0.0
        before = {name: one.clone() for name, one in kept.items() if "running" in name}
        after = {name: torch.zeros_like(one) for name, one in before.items()}
        for images, labels in program.micro_batches(step):
            for name, tensor in before.items():
                kept[name].copy_(tensor)
            share = torch.distributions.Beta(0.2, 0.2).sample().double()
            targets = 0.9 * one_hot(labels, 10).double() + 0.1 / 10
            order = torch.arange(-1, 5)
            targets = share * targets + (1 - share) * targets[order]
            images = share * images + (1 - share) * images[order]
            value = cross_entropy(model(images), targets) / 4
            value.backward()
            whole += value.item()
            for name in before:
                after[name] += kept[name] / 4
        for name, tensor in after.items():
            kept[name].copy_(tensor)
        optimizer.step()
        scheduler.step()
        for name, tensor in kept.items():
            average[name].mul_(0.8).add_(tensor.detach(), alpha=0.2)
        losses.append(whole)
    return losses, average


@pytest.mark.ranks(1, 2)
def test_the_loss_curve_is_that_of_the_bare_loop(group: Group) -> None:
    program = Program("classification", **SMALL)
    ours = program.curves(group)["loss"]
    losses, average = bare(program)
    assert_equal(ours, losses)
    for name, tensor in average.items():
        assert torch.allclose(program.average[name], tensor, atol=1e-9, rtol=0), name


def test_an_image_that_comes_three_times_is_cropped_in_three_ways() -> None:
    program = Program("classification", **SMALL)
    images, labels = next(program.batches())
    assert labels.view(8, 3).eq(labels[::3, None]).all()
    ways = [len(torch.unique(three, dim=0)) for three in images.view(8, 3, 1, 8, 8)]
    assert max(ways) == 3
