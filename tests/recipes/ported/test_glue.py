"""recipes/ported/glue.py has the loss curve of a bare loop with the same dropout."""

import pytest
import torch
from ported import Program, assert_equal
from torch.nn.functional import cross_entropy

from ddp_kit.distributed.process_group import Group

SMALL = {"global_batch": 16, "micro_batch": 4, "width": 16, "heads": 2, "epochs": 0, "pairs": 96}


def bare(program: Program) -> list[float]:
    settings = program.settings
    model = program.model()
    spared = {"bias", "norm.weight", "norm1.weight", "norm2.weight"}
    named = dict(model.named_parameters())
    others = [one for name, one in named.items() if any(name.endswith(end) for end in spared)]
    decayed = [one for one in named.values() if all(one is not other for other in others)]
    assert len(others) == 4 + 2 * 8
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups)
    losses = []
    for step in range(settings.max_steps):
        optimizer.zero_grad()
        whole = 0.0
        for tokens, segments, labels in program.micro_batches(step):
            value = cross_entropy(model(tokens, segments), labels) / 4
            value.backward()
            whole += value.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * (1 / 2 if step < 1 else 1 - (step - 1) / 11)
        optimizer.step()
        losses.append(whole)
    return losses


@pytest.mark.ranks(1, 2)
def test_the_loss_curve_is_that_of_the_bare_loop(group: Group) -> None:
    program = Program("glue", **SMALL)
    assert_equal(program.curves(group)["loss"], bare(program))
