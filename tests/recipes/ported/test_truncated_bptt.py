"""recipes/ported/truncated_bptt.py has the loss curve and the last hidden state of a bare loop, over an epoch's end."""

import pytest
import torch
from ported import Program, assert_equal
from torch.nn.functional import cross_entropy

from ddp_kit.distributed.process_group import Group

SMALL = {"global_batch": 8, "width": 12, "rows": 5, "words": 80, "lr": 2.0, "epochs": 0}


def bare(program: Program) -> tuple[list[float], torch.Tensor]:
    settings = program.settings
    model = program.model()
    text = program.module.text(settings.words)
    columns = text[: len(text) // 8 * 8].view(8, -1)
    optimizer = torch.optim.SGD(model.parameters(), lr=settings.lr)
    losses = []
    begin = columns.shape[1]
    for _ in range(settings.max_steps):
        if begin + 5 >= columns.shape[1]:
            begin = 0
            state = (torch.zeros(1, 8, 12).double(), torch.zeros(1, 8, 12).double())
        outputs, state = model.memory(model.embedding(columns[:, begin : begin + 5]), state)
        state = tuple(tensor.detach() for tensor in state)
        logits = model.out(outputs)
        targets = columns[:, begin + 1 : begin + 6]
        value = cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.25)
        optimizer.step()
        losses.append(value.item())
        begin += 5
    return losses, torch.stack(state)


def assert_is_bare(program: Program, group: Group) -> None:
    ours = program.curves(group)["loss"]
    losses, state = bare(program)
    assert_equal(ours, losses)
    assert torch.allclose(program.trained.hidden, state, atol=1e-9, rtol=0)


@pytest.mark.ranks(1)
def test_the_loss_curve_is_that_of_the_bare_loop(group: Group) -> None:
    assert_is_bare(Program("truncated_bptt", **SMALL), group)


@pytest.mark.ranks(1)
def test_in_micro_batches_too(group: Group) -> None:
    assert_is_bare(Program("truncated_bptt", micro_batch=2, **SMALL), group)


@pytest.mark.ranks(2)
def test_on_two_ranks_too(group: Group) -> None:
    assert_is_bare(Program("truncated_bptt", **SMALL), group)
    assert_is_bare(Program("truncated_bptt", micro_batch=2, **SMALL), group)
