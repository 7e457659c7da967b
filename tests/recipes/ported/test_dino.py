"""recipes/ported/dino.py has the loss curve, the teacher and the centre of a bare loop."""

import pytest
import torch
from ported import Program, assert_equal

from ddp_kit import schedules
from ddp_kit.distributed.process_group import Group

SMALL = {"global_batch": 16, "outputs": 12, "epochs": 0, "momentum": 0.9}


def bare(program: Program) -> tuple[list[float], torch.nn.Module, torch.Tensor]:
    settings = program.settings
    model = program.model()
    student, teacher = model.student, model.teacher
    centre = torch.zeros(1, 12, dtype=torch.float64)
    optimizer = torch.optim.AdamW(student.parameters(), lr=settings.lr, weight_decay=0.04)
    scheduler = schedules.warmup_cosine(optimizer, settings.max_steps)
    losses = []
    for large, small in program.batches():
        with torch.no_grad():
            taught = [teacher(large[:, 0]), teacher(large[:, 1])]
        wanted = [((outputs - centre) / 0.04).softmax(1) for outputs in taught]
        said = [student(view) for view in (large[:, 0], large[:, 1], small[:, 0], small[:, 1])]
        logs = [(outputs / 0.1).log_softmax(1) for outputs in said]
        value = 0.0
        for first in range(2):
            for second in range(4):
                if first != second:
                    value = value - (wanted[first] * logs[second]).sum(1).mean() / 6
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 3.0)
        optimizer.step()
        scheduler.step()
        with torch.no_grad():
            centre = 0.9 * centre + 0.1 * torch.cat(taught).mean(0, keepdim=True)
            for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
                slow.mul_(0.9).add_(fast, alpha=0.1)
        losses.append(value.item())
    return losses, teacher, centre[0]


def assert_is_bare(program: Program, group: Group) -> None:
    ours = program.curves(group)["loss"]
    losses, teacher, centre = bare(program)
    assert_equal(ours, losses)
    assert torch.allclose(program.trained.centre, centre, atol=1e-9, rtol=0)
    for slow, own in zip(teacher.parameters(), program.trained.teacher.parameters(), strict=True):
        assert torch.allclose(own, slow, atol=1e-9, rtol=0)


@pytest.mark.ranks(1, 2)
def test_the_loss_curve_is_that_of_the_bare_loop(group: Group) -> None:
    assert_is_bare(Program("dino", **SMALL), group)


@pytest.mark.ranks(1, 2)
def test_in_micro_batches_too(group: Group) -> None:
    assert_is_bare(Program("dino", micro_batch=4, **SMALL), group)
