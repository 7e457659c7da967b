"""After MoCo's builder.py and main_moco.py (K. He et al.): contrast with a queue of keys that a
slow encoder has made.

    torchrun --nproc_per_node=2 -m ddp_kit.train recipes/ported/moco.py

Kept: two views, a key encoder that follows the query encoder by momentum, a queue of negatives,
SGD, keys gathered over the ranks before they are queued. The key encoder moves in a hook behind the
optimizer's step: once a step, however many ranks and forward passes there are, and in no pass that
is only tried. Left out: shuffling for BatchNorm, which this encoder has not.

A rank's share must be one micro-batch, and shares must be equal: what is gathered is one
micro-batch of each rank.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

import ddp_kit
from ddp_kit import Data, Draws, LossSum, Recipe, schedules
from ddp_kit.data.known import digits
from ddp_kit.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Settings(ddp_kit.Settings):
    """Features of digits without their labels."""

    global_batch: int = 64
    epochs: int = 10
    lr: float = 0.1  # peak learning rate
    width: int = 32  # of the features
    keys: int = 512  # in the queue: a multiple of the global batch
    momentum: float = 0.99  # of the key encoder
    temperature: float = 0.2


def encoder(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 4 * 4, 64),
        nn.ReLU(),
        nn.Linear(64, width),
    )


class Moco(nn.Module):
    def __init__(self, settings: Settings):
        super().__init__()
        self.query = encoder(settings.width)
        self.key = copy.deepcopy(self.query).requires_grad_(False)
        self.temperature = settings.temperature
        self.momentum = settings.momentum
        self.register_buffer("queue", normalize(torch.randn(settings.width, settings.keys), dim=0))
        self.register_buffer("place", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def follow(self) -> None:
        """Moves the key encoder towards the query encoder."""
        for slow, fast in zip(self.key.parameters(), self.query.parameters(), strict=True):
            slow.lerp_(fast, 1 - self.momentum)

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Replaces the oldest keys by those of all ranks."""
        keys = gathered(keys)
        begin = int(self.place)
        self.queue[:, begin : begin + len(keys)] = keys.T
        self.place.copy_((self.place + len(keys)) % self.queue.shape[1])

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        """Returns logits (B, 1 + keys), of which the first is right."""
        queries = normalize(self.query(one), dim=1)
        with torch.no_grad():
            keys = normalize(self.key(other), dim=1)
        right = (queries * keys).sum(1, keepdim=True)
        logits = torch.cat([right, queries @ self.queue.clone()], dim=1) / self.temperature
        if self.training:
            self.enqueue(keys)
        return logits


def gathered(rows: Tensor) -> Tensor:
    """Returns the rows of all ranks, in the order of the ranks."""
    if not dist.is_initialized():
        return rows
    every = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(every, rows.contiguous())
    return torch.cat(every)


def two_views(batch: tuple[Tensor, Tensor], draws: Draws) -> tuple[Tensor, Tensor]:
    """Returns each image twice: moved by up to a pixel, brighter or darker, with noise."""
    views = []
    for _ in range(2):
        moves = draws.integers(3, 2) - 1
        light = torch.from_numpy(draws.uniform(1, 1, 1)).float() + 0.5
        noise = torch.from_numpy(draws.normal(1, 8, 8)).float()
        moved = []
        for image, move in zip(batch[0], moves.tolist(), strict=True):
            moved.append(image.roll(move, dims=(1, 2)))
        views.append(torch.stack(moved) * light + 0.1 * noise)
    return views[0], views[1]


def loss(model: Moco, batch: tuple[Tensor, Tensor]) -> LossSum:
    logits = model(*batch)
    first = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    right = (logits.argmax(1) == 0).sum()
    return LossSum(
        cross_entropy(logits, first, reduction="sum"),
        len(logits),
        metrics={"accuracy": (right, len(logits))},
    )


def optimizer(model: Moco, settings: Settings) -> torch.optim.SGD:
    made = torch.optim.SGD(
        model.query.parameters(), lr=settings.lr, momentum=0.9, weight_decay=1e-4
    )

    def follow(*_: Any) -> None:
        model.follow()

    made.register_step_post_hook(follow)
    return made


def recipe(settings: Settings) -> Recipe:
    if settings.micro_batch or settings.keys % settings.global_batch:
        raise ConfigError("expected no --micro-batch, and --keys a multiple of --global-batch")
    return Recipe(
        model=lambda: Moco(settings),
        loss=loss,
        optimizer=lambda model: optimizer(model, settings),
        scheduler=lambda optimizer, total_steps: schedules.warmup_cosine(
            optimizer, total_steps, warmup=0
        ),
        train_data=lambda: Data(digits("train"), augment=two_views),
    )
