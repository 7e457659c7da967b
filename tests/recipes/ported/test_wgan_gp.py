"""recipes/ported/wgan_gp.py has the curves of a bare loop: of the penalty, of the critic, and of a generator that steps at every third batch."""

import pytest
import torch
from ported import Program, assert_equal

from ddp_kit.distributed.process_group import Group

SMALL = {
    "global_batch": 16,
    "micro_batch": 4,
    "width": 8,
    "epochs": 0,
    "critic_steps": 3,
    "lr": 0.02,
}


def bare(program: Program) -> dict[str, list[float]]:
    """The noise is that of the micro-batches, which is drawn as they come; all sums are of the whole batch."""
    model = program.model()
    generator, critic = model.generator, model.critic
    of_critic = torch.optim.Adam(critic.parameters(), lr=0.02, betas=(0.5, 0.9))
    of_generator = torch.optim.Adam(generator.parameters(), lr=0.02, betas=(0.5, 0.9))
    found: dict[str, list[float]] = {"critic/loss": [], "critic/penalty": [], "generator/loss": []}
    for step in range(program.settings.max_steps):
        reals, noises, places = [], [], []
        for (real,) in program.micro_batches(step, objective=0):
            reals.append(real)
            noises.append(torch.randn(4, 2, dtype=torch.float64))
            places.append(torch.rand(4, 1).double())
        real = torch.cat(reals)
        fake = generator(torch.cat(noises)).detach()
        place = torch.cat(places)
        between = ((1 - place) * real + place * fake).requires_grad_()
        slopes = torch.autograd.grad(
            critic(between), between, grad_outputs=torch.ones(16, 1).double(), create_graph=True
        )[0]
        penalty = ((slopes.square().sum(1).sqrt() - 1) ** 2).mean()
        value = critic(fake).mean() - critic(real).mean() + penalty
        of_critic.zero_grad()
        value.backward()
        of_critic.step()
        noise = [
            torch.randn(4, 2, dtype=torch.float64) for _ in program.micro_batches(step, objective=1)
        ]
        cost = -critic(generator(torch.cat(noise))).mean()
        if step % 3 == 2:
            of_generator.zero_grad()
            cost.backward()
            of_generator.step()
        found["critic/loss"].append(value.item())
        found["critic/penalty"].append(penalty.item())
        found["generator/loss"].append(cost.item())
    return found


@pytest.mark.ranks(1, 2)
def test_the_curves_are_those_of_the_bare_loop(group: Group) -> None:
    program = Program("wgan_gp", **SMALL)
    ours = program.curves(group)
    for name, values in bare(program).items():
        assert_equal(ours[name], values)
