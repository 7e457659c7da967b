"""After improved_wgan_training's gan_toy.py (I. Gulrajani et al.): a Wasserstein GAN with gradient
penalty on eight Gaussians in a ring.

    torchrun --nproc_per_node=2 -m ddp_kit.train recipes/ported/wgan_gp.py

Kept: the penalty, Adam with betas (0.5, 0.9), five batches for the critic to one for the generator.
The last is an optimizer that takes every fifth gradient: objectives run on each global batch, so
the gradients between are computed for nothing.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam
from torch.utils.data import TensorDataset

import ddp_kit
from ddp_kit import LossSum, Objective, Recipe


@dataclass(frozen=True, kw_only=True)
class Settings(ddp_kit.Settings):
    """Eight Gaussians in a ring."""

    global_batch: int = 128
    micro_batch: int = 32  # noise is drawn for a micro-batch: the same numbers on 1, 2 and 4 ranks
    epochs: int = 20
    lr: float = 1e-3
    width: int = 64
    critic_steps: int = 5  # to one of the generator
    penalty: float = 1.0


def ring(count: int) -> Tensor:
    """Returns points (count, 2), the same at any seed of a run."""
    generator = torch.Generator().manual_seed(0)
    angles = torch.arange(count) % 8 * (math.pi / 4)
    noise = torch.randn(count, 2, generator=generator)
    return torch.stack([angles.cos(), angles.sin()], dim=1) * math.sqrt(2) + 0.02 * noise


def layers(*sizes: int) -> nn.Sequential:
    found: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        found += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*found[:-1])


class Wgan(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.generator = layers(2, width, width, width, 2)
        self.critic = layers(2, width, width, width, 1)

    def made(self, like: Tensor) -> Tensor:
        """Returns as many new points."""
        made: Tensor = self.generator(torch.randn_like(like))
        return made


def steepness(critic: nn.Module, points: Tensor) -> Tensor:
    """Returns the norms of the critic's gradients at points, to be differentiated again."""
    points = points.detach().requires_grad_()
    (slopes,) = torch.autograd.grad(critic(points).sum(), points, create_graph=True)
    return slopes.norm(dim=1)


def criticise(model: Wgan, batch: list[Tensor], penalty: float) -> LossSum:
    (real,) = batch
    with torch.no_grad():
        fake = model.made(real)
    gap = model.critic(fake).sum() - model.critic(real).sum()
    between = real + torch.rand(len(real), 1).to(real) * (fake - real)
    excess = (steepness(model.critic, between) - 1).square().sum()
    metrics = {"gap": (-gap, len(real)), "penalty": (excess, len(real))}
    return LossSum(gap + penalty * excess, len(real), metrics=metrics)


def please(model: Wgan, batch: list[Tensor]) -> LossSum:
    return LossSum(-model.critic(model.made(batch[0])).sum(), len(batch[0]))


class EveryNth(Adam):
    """Adam that steps at every n-th call. The calls are counted in a group, which is saved."""

    def __init__(self, parameters: Any, *, n: int, **settings: Any):
        super().__init__(parameters, **settings)
        self.param_groups[0] |= {"n": n, "calls": 0}

    def step(self, closure: Any = None) -> Any:
        group = self.param_groups[0]
        group["calls"] += 1
        if group["calls"] % group["n"] == 0:
            return super().step(closure)
        return None


def distance(model: Wgan, batch: list[Tensor]) -> dict[str, tuple[Tensor, int]]:
    """Returns how far new points are from the nearest of the eight centres."""
    made = model.made(batch[0])
    angles = torch.arange(8, device=made.device) * (math.pi / 4)
    centres = torch.stack([angles.cos(), angles.sin()], dim=1).to(made) * math.sqrt(2)
    return {"distance": (torch.cdist(made, centres).amin(1).sum(), len(made))}


def recipe(settings: Settings) -> Recipe:
    betas = (0.5, 0.9)
    return Recipe(
        model=lambda: Wgan(settings.width),
        objectives=[
            Objective(
                loss=lambda model, batch: criticise(model, batch, settings.penalty),
                optimizer=lambda part: Adam(part.parameters(), lr=settings.lr, betas=betas),
                trains="critic",
            ),
            Objective(
                loss=please,
                optimizer=lambda part: EveryNth(
                    part.parameters(), n=settings.critic_steps, lr=settings.lr, betas=betas
                ),
                trains="generator",
            ),
        ],
        train_data=lambda: TensorDataset(ring(4096)),
        eval_data=lambda: TensorDataset(ring(512)),
        evaluate=distance,
    )
