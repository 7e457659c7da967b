"""After CLIP (A. Radford et al.), as OpenCLIP's loss.py trains it: images and captions, contrasted
over the batches of all ranks.

    torchrun --nproc_per_node=2 -m ddp_kit.train recipes/ported/clip_gathered.py

Kept: two towers, one learned temperature that is clamped to at most 100, features gathered over the
ranks. Each rank takes the rows of its own samples against the columns of all; the gradient that
other ranks' rows have for its features comes back through `Gathered`.

A rank's share must be one micro-batch, and shares must be equal: what is gathered is one
micro-batch of each rank.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

import ddp_kit
from ddp_kit import LossSum, Recipe, schedules
from ddp_kit.data.known import digits
from ddp_kit.errors import ConfigError

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LENGTH = 24  # characters of a caption
HOTTEST = math.log(100)


@dataclass(frozen=True, kw_only=True)
class Settings(ddp_kit.Settings):
    """Digits and the words that name them."""

    global_batch: int = 64
    epochs: int = 10
    lr: float = 1e-2  # peak learning rate
    width: int = 64  # of the features


class Gathered(torch.autograd.Function):
    """The rows of all ranks, in the order of the ranks. Gradients are summed over them."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.size = len(rows)
        every = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(every, rows.contiguous())
        return torch.cat(every)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        begin = dist.get_rank() * ctx.size
        return gradient[begin : begin + ctx.size]


class Captioned:
    """Digits, each with a caption: (1, 8, 8) float and (LENGTH,) int, characters and zeros."""

    def __init__(self, split: str):
        self._digits = digits(split)

    def __len__(self) -> int:
        return len(self._digits)

    def __getitems__(self, indices: Any) -> tuple[Tensor, Tensor]:
        images, labels = self._digits.__getitems__(indices)
        captions = np.zeros((len(labels), LENGTH), np.int64)
        for row, index, label in zip(captions, indices, labels.tolist(), strict=True):
            # So that captions differ where digits are the same.
            said = f"{NAMES[label]} by hand {index % 97}".encode()
            row[: len(said)] = list(said)
        return images, torch.from_numpy(captions)


class Clip(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.images = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, width)
        )
        self.characters = nn.Embedding(128, width, padding_idx=0)
        self.places = nn.Parameter(torch.randn(LENGTH, width))
        self.text = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width))
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, images: Tensor, captions: Tensor) -> tuple[Tensor, Tensor]:
        """Returns features of length 1, (B, width) each."""
        read = (self.characters(captions) * self.places).sum(1)
        return normalize(self.images(images), dim=1), normalize(self.text(read), dim=1)


def loss(model: Clip, batch: tuple[Tensor, Tensor]) -> LossSum:
    images, captions = model(*batch)
    every_image, every_caption, first = images, captions, 0
    if dist.is_initialized() and model.training:
        every_image, every_caption = Gathered.apply(images), Gathered.apply(captions)
        first = dist.get_rank() * len(images)
    scale = model.log_scale.clamp(max=HOTTEST).exp()
    own = torch.arange(first, first + len(images), device=images.device)
    by_image = scale * images @ every_caption.T
    by_caption = scale * captions @ every_image.T
    total = cross_entropy(by_image, own, reduction="sum")
    total = total + cross_entropy(by_caption, own, reduction="sum")
    right = (by_image.argmax(1) == own).sum()
    return LossSum(total / 2, len(images), metrics={"accuracy": (right, len(images))})


def features(model: Clip, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Returns rows, so that all samples are contrasted however ranks and batches cut them."""
    images, captions = model(*batch)
    return {"images": images, "captions": captions}


def recall(means: dict[str, float], rows: dict[str, Tensor]) -> dict[str, float]:
    """Returns how often the caption of an image is among the ten nearest."""
    scores = rows["images"] @ rows["captions"].T
    nearest = scores.topk(10, dim=1).indices
    own = torch.arange(len(scores)).unsqueeze(1)
    return {"recall@10": float((nearest == own).any(1).double().mean())}


def recipe(settings: Settings) -> Recipe:
    if settings.micro_batch:
        raise ConfigError("--micro-batch has no place here: the loss needs the whole batch at once")
    return Recipe(
        model=lambda: Clip(settings.width),
        loss=loss,
        optimizer=lambda model: torch.optim.AdamW(model.parameters(), lr=settings.lr),
        scheduler=lambda optimizer, total_steps: schedules.warmup_cosine(optimizer, total_steps),
        train_data=lambda: Captioned("train"),
        eval_data=lambda: Captioned("validation"),
        evaluate=features,
        summarize=recall,
    )
