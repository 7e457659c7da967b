"""Three tasks on one trunk: a MNIST image's digit, its parity, and how much ink it holds, with
fixed or learned weights.

    torchrun --nproc_per_node=2 -m ddp_kit.train recipes/multitask.py --data-root data
    torchrun --nproc_per_node=2 -m ddp_kit.train recipes/multitask.py --data-root data \
        --weights learned
    torchrun --nproc_per_node=2 -m ddp_kit.train recipes/multitask.py --data-root data \
        --absent 0.9 --find-unused-parameters

2,145 steps (5 epochs); of the 10,000 test images, mass in white pixels, of which an image has 102
on average:
fixed weights    digit 99.25 %, parity 99.11 %, mass off by 1.98
learned weights  digit 99.27 %, parity 99.37 %, mass off by 1.87; they end at 4.3, 9.5 and 9.3
--absent 0.9     digit 98.67 %, parity 98.98 %, mass off by 2.34, of a tenth of the labels in
                 each epoch, another tenth each time
100 s of processor time over both ranks, the command's start included. 2 ranks on 2 CPU cores, torch
2.15.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

import ddp_kit
from ddp_kit import Data, Draws, LossSum, Recipe, schedules
from ddp_kit.data.known import mnist
from ddp_kit.errors import ConfigError

OUTPUTS = {"digit": 10, "parity": 1, "mass": 1}
MASS_STD = 34.0  # of the images' mass, in white pixels
WHITE = 0.3081  # a white pixel over a normalised unit: mnist() divides by it


@dataclass(frozen=True, kw_only=True)
class Settings(ddp_kit.Settings):
    """Digit, parity and mass of MNIST images."""

    global_batch: int = 128
    epochs: int = 5
    lr: float = 2e-3  # peak learning rate
    width: int = 16  # channels of the first block; each further block has twice as many
    blocks: int = 3  # convolutions in the trunk, each of which halves the image
    weights: Literal["fixed", "learned"] = (
        "fixed"  # of the tasks; learned: from each task's uncertainty
    )
    task_weights: tuple[float, float, float] = (
        1.0,
        1.0,
        1.0,
    )  # of digit, parity and mass, where they are fixed
    # share of the training images, another one for each task, that carry no label of it, drawn anew
    # each epoch
    absent: float = 0.0
    data_root: str = "data"  # folder that holds MNIST/raw
    download: bool = False  # fetch MNIST if it is not there


class MultiTask(nn.Module):
    """A trunk of blocks, and for each task a head, a loss and, where weights are learned, the
    logarithm of a variance.
    """

    def __init__(self, settings: Settings):
        super().__init__()
        channels = (1, *(settings.width * 2**i for i in range(settings.blocks)))
        self.blocks = nn.ModuleList(
            nn.Conv2d(inputs, outputs, 3, padding=1) for inputs, outputs in pairwise(channels)
        )
        side = 28 >> settings.blocks
        self.heads = nn.ModuleDict(
            {task: nn.Linear(channels[-1] * side * side, size) for task, size in OUTPUTS.items()}
        )
        self.losses = nn.ModuleDict(
            {
                "digit": nn.CrossEntropyLoss(reduction="sum"),
                "parity": nn.BCEWithLogitsLoss(reduction="sum"),
                "mass": nn.MSELoss(reduction="sum"),
            }
        )
        self.weights = dict(zip(OUTPUTS, settings.task_weights, strict=True))
        is_learned = settings.weights == "learned"
        self.log_variances = nn.ParameterDict(
            {task: nn.Parameter(torch.zeros(())) for task in OUTPUTS if is_learned}
        )

    def features(self, images: Tensor) -> Tensor:
        """(B, 1, 28, 28) -> (B, features)."""
        for block in self.blocks:
            images = nn.functional.max_pool2d(block(images).relu(), 2)
        return images.flatten(1)

    def weighted(self, task: str, total: Tensor, count: int) -> Tensor:
        """Weighs a task's summed loss.

        Source: Kendall et al., "Multi-task learning using uncertainty", arXiv 1705.07115, section
        3.
        """
        if task not in self.log_variances:
            return self.weights[task] * total
        log_variance = self.log_variances[task]
        half = (
            0.5 if task == "mass" else 1.0
        )  # the logarithm of a normal density has it, that of a softmax does not
        return half * torch.exp(-log_variance) * total + 0.5 * log_variance * count


def targets(images: Tensor, labels: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yields each task with its targets: (B,) int classes, (B, 1) 0 or 1, (B, 1) mass around 0 in
    standard deviations.
    """
    yield "digit", labels
    yield "parity", (labels % 2).to(images.dtype).unsqueeze(1)
    yield "mass", images.sum((1, 2, 3)).unsqueeze(1) * (WHITE / MASS_STD)


def measured(task: str, outputs: Tensor, target: Tensor) -> Tensor:
    """Returns the sum over samples of what a task is judged by: right answers, or the error in
    white pixels.
    """
    if task == "mass":
        return (outputs.detach() - target).abs().sum() * MASS_STD
    answers = outputs.argmax(1) if task == "digit" else (outputs > 0).to(target.dtype)
    return (answers == target).sum()


def loss(model: MultiTask, batch: tuple[Tensor, ...]) -> LossSum:
    """Every label weighs the same: a task that half of the images carry counts half.

    A task that no image carries is left out.
    """
    # (B, 1, 28, 28) float, (B,) int, with --absent (B, tasks) bool: whether a label is there
    images, labels, *drawn = batch
    features = model.features(images)
    total = 0.0 * features.sum()  # a batch without any label has a gradient too
    metrics: dict[str, tuple[Tensor | float, int]] = {}
    for i, (task, target) in enumerate(targets(images, labels)):
        there = (
            drawn[0][:, i].nonzero().squeeze(1)
            if drawn
            else torch.arange(len(images), device=images.device)
        )  # waits for the device
        name = f"{task}/{'error' if task == 'mass' else 'accuracy'}"
        metrics[name] = (0.0, 0)  # the same names in every batch, with nothing to count
        if len(there):
            outputs, target = model.heads[task](features[there]), target[there]
            total = total + model.weighted(task, model.losses[task](outputs, target), len(there))
            metrics[name] = (measured(task, outputs, target), len(there))
    weights = {
        f"{task}/weight": (torch.exp(-log_variance.detach()), 1)
        for task, log_variance in model.log_variances.items()
    }
    return LossSum(total, len(images), metrics=metrics | weights)


def check(settings: Settings) -> None:
    if settings.weights == "learned" and settings.task_weights != Settings.task_weights:
        raise ConfigError(
            "--task-weights has no effect with --weights learned: leave it out, "
            "or type --weights fixed."
        )
    if (
        min(settings.task_weights) < 0
        or not 0 <= settings.absent < 1
        or not 1 <= settings.blocks <= 4
    ):
        raise ConfigError(
            f"--task-weights {settings.task_weights} --absent {settings.absent} "
            f"--blocks {settings.blocks}: expected weights of 0 or more, "
            "a share from 0 to below 1, and 1 to 4 blocks."
        )
    if settings.absent and not settings.find_unused_parameters:
        raise ConfigError(
            f"--absent {settings.absent} leaves heads without a gradient in some batches: "
            "type --find-unused-parameters too."
        )


def recipe(settings: Settings) -> Recipe:
    check(settings)

    def drop_labels(batch: tuple[Tensor, Tensor], draws: Draws) -> tuple[Tensor, ...]:
        return (*batch, torch.from_numpy(draws.uniform(len(OUTPUTS)) >= settings.absent))

    return Recipe(
        model=lambda: MultiTask(settings),
        loss=loss,
        optimizer=lambda model: torch.optim.AdamW(model.parameters(), lr=settings.lr),
        scheduler=lambda optimizer, total_steps: schedules.warmup_cosine(optimizer, total_steps),
        train_data=lambda: Data(
            mnist(settings.data_root, "train", download=settings.download),
            augment=drop_labels if settings.absent else None,
        ),
        eval_data=lambda: mnist(settings.data_root, "validation", download=settings.download),
        test_data=lambda: mnist(settings.data_root, "test", download=settings.download),
    )
