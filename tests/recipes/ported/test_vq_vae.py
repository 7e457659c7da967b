"""recipes/ported/vq_vae.py has the loss curve and the codebook of a bare loop."""

import pytest
import torch
from ported import Program, assert_equal
from torch.nn.functional import mse_loss

from ddp_kit.distributed.process_group import Group

SMALL = {"global_batch": 16, "width": 4, "codes": 8, "epochs": 0, "decay": 0.8, "lr": 0.01}


def bare(program: Program) -> tuple[list[float], torch.Tensor]:
    model = program.model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    sizes, sums = torch.ones(8).double(), model.codebook.sums.clone()
    losses = []
    for images, _ in program.batches():
        smoothed = (sizes + 1e-5) / (sizes.sum() + 8e-5) * sizes.sum()
        codes = sums / smoothed[:, None]
        states = model.encoder(images)
        rows = states.permute(0, 2, 3, 1).reshape(-1, 4)
        nearest = (rows[:, None] - codes).square().sum(2).argmin(1)
        chosen = codes[nearest]
        straight = rows + (chosen - rows).detach()
        made = model.decoder(straight.reshape(16, 4, 4, 4).permute(0, 3, 1, 2))
        value = mse_loss(made, images) + 0.25 * mse_loss(rows, chosen)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        for code in range(8):
            own = rows[nearest == code].detach()
            sizes[code] = 0.8 * sizes[code] + 0.2 * len(own) / 16
            sums[code] = 0.8 * sums[code] + 0.2 * own.sum(0) / 16
        losses.append(value.item())
    assert len(nearest.unique()) > 2
    return losses, sums


def assert_is_bare(program: Program, group: Group) -> None:
    ours = program.curves(group)["loss"]
    losses, sums = bare(program)
    assert_equal(ours, losses)
    assert torch.allclose(program.trained.codebook.sums, sums, atol=1e-9, rtol=0)


@pytest.mark.ranks(1, 2)
def test_the_loss_curve_is_that_of_the_bare_loop(group: Group) -> None:
    assert_is_bare(Program("vq_vae", **SMALL), group)


@pytest.mark.ranks(1, 2)
def test_in_micro_batches_too(group: Group) -> None:
    assert_is_bare(Program("vq_vae", micro_batch=4, **SMALL), group)
