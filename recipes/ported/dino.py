"""After DINO's main_dino.py (M. Caron et al.): a student learns from its own average, the teacher.

    torchrun --nproc_per_node=2 -m ddp_kit.train recipes/ported/dino.py

Kept: two large and two small crops, a teacher that sees the large ones only, its outputs centred
and sharpened, a last layer of normalised weights, AdamW, warm-up. The teacher follows in a hook
behind the optimizer's step: once a step, and in no pass that is only tried. The centre is a buffer
that each forward pass moves by what it sees; `buffers=` says that the mean of all micro-batches, on
all ranks, is what stays of it.
"""

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

import ddp_kit
from ddp_kit import Data, Draws, LossSum, Recipe, schedules
from ddp_kit.data.known import digits

SMALL_CROP = 6  # pixels of 8
SHARPNESS = {"student": 0.1, "teacher": 0.04}


@dataclass(frozen=True, kw_only=True)
class Settings(ddp_kit.Settings):
    """Features of digits without their labels."""

    global_batch: int = 64
    epochs: int = 10
    lr: float = 2e-3  # peak learning rate
    grad_clip: float = 3.0
    outputs: int = 64  # that student and teacher compare
    momentum: float = 0.99  # of the teacher
    centre_momentum: float = 0.9


class Network(nn.Module):
    """A backbone for images of any size, and a head."""

    def __init__(self, outputs: int):
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.GELU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
        )
        self.head = nn.Sequential(nn.Linear(32 * 4, 64), nn.GELU(), nn.Linear(64, 32))
        self.last = nn.Parameter(torch.randn(outputs, 32))

    def forward(self, images: Tensor) -> Tensor:
        features = normalize(self.head(self.backbone(images)), dim=1)
        return linear(features, normalize(self.last, dim=1))


class Dino(nn.Module):
    def __init__(self, settings: Settings):
        super().__init__()
        self.student = Network(settings.outputs)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.momentum = settings.momentum
        self.centre_momentum = settings.centre_momentum
        self.register_buffer("centre", torch.zeros(settings.outputs))

    @torch.no_grad()
    def follow(self) -> None:
        """Moves the teacher towards the student."""
        for slow, fast in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            slow.lerp_(fast, 1 - self.momentum)

    @torch.no_grad()
    def taught(self, images: Tensor) -> Tensor:
        """Returns the teacher's probabilities, and moves the centre in training."""
        outputs = self.teacher(images)
        wanted = ((outputs - self.centre) / SHARPNESS["teacher"]).softmax(1)
        if self.training:
            self.centre.lerp_(outputs.mean(0), 1 - self.centre_momentum)
        return wanted


def cropped(batch: tuple[Tensor, Tensor], draws: Draws) -> tuple[Tensor, Tensor]:
    """Returns large crops (B, 2, 1, 8, 8), moved and with noise, and small ones."""
    images = batch[0]
    last = 8 - SMALL_CROP
    large = []
    small = []
    for _ in range(2):
        places = np.concatenate([draws.integers(3, 2) - 1, draws.integers(last + 1, 2)], axis=1)
        for image, (down, right, top, left) in zip(images, places.tolist(), strict=True):
            large.append(image.roll((down, right), (1, 2)))
            small.append(image[:, top : top + SMALL_CROP, left : left + SMALL_CROP])
    noise = torch.from_numpy(draws.normal(2, 1, 8, 8)).float()
    crops = (torch.stack(large), torch.stack(small))
    large, small = (stack.unflatten(0, (2, -1)).transpose(0, 1) for stack in crops)
    return large + 0.1 * noise, small


def loss(model: Dino, batch: tuple[Tensor, Tensor]) -> LossSum:
    large, small = batch
    views = [*large.unbind(1), *small.unbind(1)]
    wanted = model.taught(large.transpose(0, 1).flatten(0, 1)).chunk(2)
    terms = []
    for number, view in enumerate(views):
        said = (model.student(view) / SHARPNESS["student"]).log_softmax(1)
        terms += [-(other * said).sum() for i, other in enumerate(wanted) if i != number]
    return LossSum(torch.stack(terms).sum() / len(terms), len(large))


def optimizer(model: Dino, settings: Settings) -> torch.optim.AdamW:
    made = torch.optim.AdamW(model.student.parameters(), lr=settings.lr, weight_decay=0.04)

    def follow(*_: Any) -> None:
        model.follow()

    made.register_step_post_hook(follow)
    return made


def features(model: Dino, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Returns the teacher's features as rows, and labels."""
    return {"features": normalize(model.teacher.backbone(batch[0]), dim=1), "labels": batch[1]}


def nearest(means: dict[str, float], rows: dict[str, Tensor]) -> dict[str, float]:
    """Returns how often the nearest other image has the same label."""
    scores = (rows["features"] @ rows["features"].T).fill_diagonal_(-2)
    right = rows["labels"][scores.argmax(1)] == rows["labels"]
    return {"nearest": float(right.double().mean())}


def recipe(settings: Settings) -> Recipe:
    return Recipe(
        model=lambda: Dino(settings),
        loss=loss,
        optimizer=lambda model: optimizer(model, settings),
        scheduler=lambda optimizer, total_steps: schedules.warmup_cosine(optimizer, total_steps),
        train_data=lambda: Data(digits("train"), augment=cropped),
        eval_data=lambda: digits("validation"),
        evaluate=features,
        summarize=nearest,
        buffers={"centre": "mean"},
    )
