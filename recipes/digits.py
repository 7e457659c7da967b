"""Handwritten digits: a small convolutional net on the 1,797 images that ship inside scikit-learn.

Nothing to download.

    torchrun --nproc_per_node=2 -m ddp_kit.train recipes/digits.py

Reaches 99.4 % of the 360 validation images in 220 steps, on 1, 2 and 4 ranks alike (98.9 to 99.7 %
over seeds 0 to 7 in one process); about 2 s of training. 2 CPU cores, torch 2.15.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import ddp_kit
from ddp_kit import LossSum, Recipe, schedules
from ddp_kit.data.known import digits


@dataclass(frozen=True, kw_only=True)
class Settings(ddp_kit.Settings):
    """Handwritten digits, 8 x 8 pixels."""

    global_batch: int = 64
    epochs: int = 10
    lr: float = 0.01  # peak learning rate
    width: int = 16  # channels of the first convolution


def net(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(2 * width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(2 * width * 2 * 2, 10),
    )


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> LossSum:
    images, labels = batch  # (B, 1, 8, 8) float, (B,) int
    logits = model(images)
    correct = (logits.argmax(1) == labels).sum()
    return LossSum(
        cross_entropy(logits, labels, reduction="sum"),
        len(labels),
        metrics={"accuracy": (correct, len(labels))},
    )


def recipe(settings: Settings) -> Recipe:
    return Recipe(
        model=lambda: net(settings.width),
        loss=loss,
        optimizer=lambda model: torch.optim.AdamW(model.parameters(), lr=settings.lr),
        scheduler=lambda optimizer, total_steps: schedules.warmup_cosine(optimizer, total_steps),
        train_data=lambda: digits("train"),
        eval_data=lambda: digits("validation"),
    )
