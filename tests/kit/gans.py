"""A small GAN: two objectives on one batch."""

from typing import Any

import torch
from cases import vectors
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import ExponentialLR

from ddp_kit import LossSum, Objective, Recipe


class Gan(nn.Module):
    """The noise is part of a sample: the first half of its features."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3))
        self.discriminator = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))


def judged(model: Gan, batch: Any) -> LossSum:
    noise, real = batch[0].chunk(2, dim=1)
    fake, true = model.discriminator(model.generator(noise)), model.discriminator(real)
    total = cross_entropy(fake, torch.zeros_like(fake), reduction="sum") + cross_entropy(
        true, torch.ones_like(true), reduction="sum"
    )
    return LossSum(total, len(real), metrics={"fooled": ((fake > 0).sum(), len(real))})


def fooled(model: Gan, batch: Any) -> LossSum:
    fake = model.discriminator(model.generator(batch[0][:, :3]))
    return LossSum(cross_entropy(fake, torch.ones_like(fake), reduction="sum"), len(fake))


def gan(*, order: str = "dg") -> Recipe:
    parts = {
        "d": Objective(
            loss=judged,
            optimizer=lambda part: SGD(part.parameters(), lr=0.5, momentum=0.9),
            trains="discriminator",
        ),
        "g": Objective(
            loss=fooled,
            optimizer=lambda part: Adam(part.parameters(), lr=0.05),
            scheduler=lambda optimizer, total_steps: ExponentialLR(optimizer, gamma=0.9),
            trains="generator",
        ),
    }
    return Recipe(
        model=Gan, objectives=[parts[name] for name in order], train_data=lambda: vectors()
    )
