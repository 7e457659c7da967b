"""After pytorch-center-loss's main.py (K. Zhou; Y. Wen et al.): features that lie near the centre
of their class.

    torchrun --nproc_per_node=2 -m ddp_kit.train recipes/ported/center_loss.py

Kept: cross-entropy and the distance to learned centres in one loss, and a rate of their own for the
centres, which the weight of their loss does not change. That program has two optimizers and divides
the centres' gradients by the weight between backward and step; here their group has its rate
divided by it, which for plain SGD is the same.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR

import ddp_kit
from ddp_kit import LossSum, Recipe
from ddp_kit.data.known import digits


@dataclass(frozen=True, kw_only=True)
class Settings(ddp_kit.Settings):
    """Digits with features of two numbers."""

    global_batch: int = 64
    epochs: int = 20
    lr: float = 0.02  # of the model; it falls by half after each third of the run
    centre_lr: float = 0.5
    weight: float = 0.1  # of the distance to the centres
    features: int = 2


class Net(nn.Module):
    def __init__(self, features: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.PReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.PReLU(),
            nn.Flatten(),
            nn.Linear(32 * 4 * 4, features),
        )
        self.head = nn.Linear(features, 10)
        self.centres = nn.Parameter(torch.randn(10, features))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(images)
        return features, self.head(features)


def loss(model: Net, batch: tuple[Tensor, Tensor], weight: float) -> LossSum:
    images, labels = batch
    features, logits = model(images)
    entropy = cross_entropy(logits, labels, reduction="sum")
    distance = (features - model.centres[labels]).square().sum()
    right = (logits.argmax(1) == labels).sum()
    metrics = {"accuracy": (right, len(labels)), "distance": (distance, len(labels))}
    return LossSum(entropy + weight * distance, len(labels), metrics=metrics)


def optimizer(model: Net, settings: Settings) -> torch.optim.SGD:
    net = [*model.body.parameters(), *model.head.parameters()]
    centres = {
        "params": [model.centres],
        "lr": settings.centre_lr / settings.weight,
        "momentum": 0.0,
        "weight_decay": 0.0,
    }
    return torch.optim.SGD(
        [{"params": net}, centres], lr=settings.lr, momentum=0.9, weight_decay=5e-4
    )


def schedule(optimizer: torch.optim.SGD, total_steps: int) -> LambdaLR:
    """The model's rate falls, that of the centres stays."""
    return LambdaLR(optimizer, [lambda step: 0.5 ** (3 * step // total_steps), lambda step: 1.0])


def recipe(settings: Settings) -> Recipe:
    return Recipe(
        model=lambda: Net(settings.features),
        loss=lambda model, batch: loss(model, batch, settings.weight),
        optimizer=lambda model: optimizer(model, settings),
        scheduler=schedule,
        train_data=lambda: digits("train"),
        eval_data=lambda: digits("validation"),
    )
