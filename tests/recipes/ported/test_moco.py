"""recipes/ported/moco.py has the loss curve, the queue and the key encoder of a bare loop."""

import copy

import pytest
import torch
from ported import Program, assert_equal
from torch.nn.functional import cross_entropy, normalize

from ddp_kit import schedules
from ddp_kit.distributed.process_group import Group

# The queue goes round more than once.
SMALL = {"global_batch": 16, "width": 8, "keys": 64, "epochs": 0, "momentum": 0.9}


def bare(program: Program) -> tuple[list[float], torch.Tensor, torch.nn.Module]:
    settings = program.settings
    model = program.model()
    query, key = model.query, copy.deepcopy(model.query)
    queue = model.queue.T.clone()
    optimizer = torch.optim.SGD(query.parameters(), lr=settings.lr, momentum=0.9, weight_decay=1e-4)
    scheduler = schedules.warmup_cosine(optimizer, settings.max_steps, warmup=0)
    losses = []
    for step, (one, other) in enumerate(program.batches()):
        with torch.no_grad():
            if step:
                for slow, fast in zip(key.parameters(), query.parameters(), strict=True):
                    slow.mul_(0.9).add_(fast, alpha=0.1)
            keys = normalize(key(other), dim=1)
        queries = normalize(query(one), dim=1)
        right = torch.einsum("nc,nc->n", queries, keys)
        logits = torch.cat([right.unsqueeze(1), queries @ queue.T], 1) / 0.2
        value = cross_entropy(logits, torch.zeros(16, dtype=torch.int64))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        scheduler.step()
        queue[step * 16 % 64 : step * 16 % 64 + 16] = keys
        losses.append(value.item())
    return losses, queue, key


@pytest.mark.ranks(1, 2)
def test_the_loss_curve_is_that_of_the_bare_loop(group: Group) -> None:
    program = Program("moco", **SMALL)
    ours = program.curves(group)["loss"]
    losses, queue, _ = bare(program)
    assert_equal(ours, losses)
    assert torch.allclose(program.trained.queue.T, queue, atol=1e-9, rtol=0)
    assert int(program.trained.place) == 12 * 16 % 64
