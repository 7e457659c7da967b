"""recipes/ported/clip_gathered.py has the loss curve of a bare loop over whole batches."""

import pytest
import torch
from ported import Program, assert_equal
from torch.nn.functional import cross_entropy

from ddp_kit import schedules
from ddp_kit.distributed.process_group import Group

SMALL = {"global_batch": 24, "width": 16, "lr": 0.05, "epochs": 0}


def bare(program: Program) -> list[float]:
    model = program.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=program.settings.lr)
    scheduler = schedules.warmup_cosine(optimizer, program.settings.max_steps)
    losses = []
    for images, captions in program.batches():
        image, caption = model(images, captions)
        logits = model.log_scale.clamp(max=4.605170185988092).exp() * image @ caption.T
        own = torch.arange(len(logits))
        value = (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        scheduler.step()
        losses.append(value.item())
    return losses


@pytest.mark.ranks(1, 2)
def test_the_loss_curve_is_that_of_the_bare_loop(group: Group) -> None:
    program = Program("clip_gathered", **SMALL)
    assert_equal(program.curves(group)["loss"], bare(program))


@pytest.mark.slow
@pytest.mark.steady
@pytest.mark.ranks(3, 4)
def test_on_more_ranks_too(group: Group) -> None:
    program = Program("clip_gathered", **SMALL)
    assert_equal(program.curves(group)["loss"], bare(program))
