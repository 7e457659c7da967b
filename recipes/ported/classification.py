"""After torchvision's references/classification (train.py, transforms.py, sampler.py): the recipe
of "How to train state-of-the-art models", on digits.

    torchrun --nproc_per_node=2 -m ddp_kit.train recipes/ported/classification.py

Kept: mixup, label smoothing, repeated augmentation, an average of the weights that is evaluated, no
decay for norms, warm-up and cosine. The average is the flag `--ema`, and repeated augmentation an
order in which each image comes three times: each time is augmented in its own way.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Beta
from torch.nn.functional import cross_entropy, one_hot

import ddp_kit
from ddp_kit import Data, LossSum, Recipe, schedules
from ddp_kit.data.images import ImageArray
from ddp_kit.data.known import digits

REPEATS = 3


@dataclass(frozen=True, kw_only=True)
class Settings(ddp_kit.Settings):
    """Digits with all tricks."""

    global_batch: int = 64
    micro_batch: int = 32  # BatchNorm and mixup see one at a time
    epochs: int = 15
    lr: float = 0.1  # peak learning rate
    weight_decay: float = 2e-4  # of all but norms
    label_smoothing: float = 0.1
    mixup: float = 0.2  # alpha of the Beta distribution; 0 is off
    ema: float = 0.98
    width: int = 16


def repeated(seed: int, epoch: int, size: int) -> np.ndarray:
    """An order with each image three times in a row, as long as the data set."""
    order = np.random.default_rng((seed, epoch)).permutation(size)
    return np.repeat(order, REPEATS)[:size]


def cropped() -> ImageArray:
    """The training digits, cropped at random places in training."""
    pixels, labels = digits("train").pixels()
    return ImageArray(pixels, labels, mean=(0.2873,), std=(0.3539,), crop_padding=1)


def net(width: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    inputs = 1
    for stride in (1, 2, 2):
        layers += [
            nn.Conv2d(inputs, width, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
        inputs = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * 4, 10))


def mixed(images: Tensor, labels: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Returns each image mixed with the one before it, and soft labels. One share for all."""
    targets = one_hot(labels, 10).to(images)
    if not alpha:
        return images, targets
    share = Beta(alpha, alpha).sample().to(images)
    mixed_images = share * images + (1 - share) * images.roll(1, 0)
    return mixed_images, share * targets + (1 - share) * targets.roll(1, 0)


def loss(model: nn.Module, batch: tuple[Tensor, Tensor], settings: Settings) -> LossSum:
    images, labels = batch
    images, targets = mixed(images, labels, settings.mixup)
    total = cross_entropy(
        model(images), targets, label_smoothing=settings.label_smoothing, reduction="sum"
    )
    return LossSum(total, len(labels))


def measure(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, tuple[Tensor, int]]:
    images, labels = batch
    logits = model(images)
    return {
        "loss": (cross_entropy(logits, labels, reduction="sum"), len(labels)),
        "accuracy": ((logits.argmax(1) == labels).sum(), len(labels)),
    }


def optimizer(model: nn.Module, settings: Settings) -> torch.optim.SGD:
    norms = []
    others = []
    for module in model.modules():
        own = norms if isinstance(module, nn.BatchNorm2d) else others
        own += module.parameters(recurse=False)
    groups = [
        {"params": others, "weight_decay": settings.weight_decay},
        {"params": norms, "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, lr=settings.lr, momentum=0.9, nesterov=True)


def recipe(settings: Settings) -> Recipe:
    return Recipe(
        model=lambda: net(settings.width),
        loss=lambda model, batch: loss(model, batch, settings),
        optimizer=lambda model: optimizer(model, settings),
        scheduler=lambda optimizer, total_steps: schedules.warmup_cosine(optimizer, total_steps),
        train_data=lambda: Data(cropped(), order=repeated),
        eval_data=lambda: digits("validation"),
        evaluate=measure,
    )
