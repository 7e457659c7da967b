"""recipes/ported/nano_gpt.py has the loss curve of a bare loop."""

import math

import pytest
import torch
from ported import Program, assert_equal
from torch.nn.functional import cross_entropy

from ddp_kit.distributed.process_group import Group


def rate(step: int, settings: object) -> float:
    warmup = round(0.05 * settings.max_steps)
    if step < warmup:
        return settings.lr * (step + 1) / (warmup + 1)
    part = (step - warmup) / (settings.max_steps - warmup)
    least = settings.lr / 10
    return least + (settings.lr - least) * 0.5 * (1 + math.cos(math.pi * part))


def bare(program: Program) -> list[float]:
    settings = program.settings
    model = program.model()
    assert model.head.weight is model.tokens.weight
    vectors = [weight for weight in model.parameters() if weight.dim() < 2]
    matrices = [weight for weight in model.parameters() if weight.dim() >= 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    losses = []
    for step, batch in enumerate(program.batches()):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, settings)
        optimizer.zero_grad()
        value = cross_entropy(model(batch[:, :-1]).transpose(1, 2), batch[:, 1:])
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(value.item())
    return losses


SMALL = {"width": 16, "heads": 2, "block_size": 12, "global_batch": 12, "micro_batch": 3}


@pytest.mark.ranks(1, 2)
def test_the_loss_curve_is_that_of_the_bare_loop(group: Group) -> None:
    program = Program("nano_gpt", **SMALL)
    assert_equal(program.curves(group)["loss"], bare(program))


@pytest.mark.ranks(2)
def test_in_fp32_too(group: Group) -> None:
    program = Program("nano_gpt", precision="fp32", lr=1e-4, **SMALL)
    assert_equal(program.curves(group)["loss"], bare(program), within=1e-5)
