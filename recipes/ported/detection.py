"""After torchvision's references/detection (train.py, engine.py): a model that returns a dict of
losses when it trains, and boxes when it does not.

    torchrun --nproc_per_node=2 -m ddp_kit.train recipes/ported/detection.py

Kept: images with lists of dicts as targets, their own collate, the sum of the dict's losses. The
detector is one of cells, as FCOS has them: each loss is a sum over all cells or boxes, and is
divided by the boxes of the whole batch, however they fall on ranks.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, smooth_l1_loss

import ddp_kit
from ddp_kit import Data, LossSum, Recipe, schedules

CELLS = 4  # in a row and in a column
PIXELS = 8  # in a row of a cell
Targets = list[dict[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Settings(ddp_kit.Settings):
    """Bright boxes and hollow boxes."""

    global_batch: int = 32
    epochs: int = 12
    lr: float = 1e-2  # peak learning rate
    width: int = 16  # channels
    images: int = 512  # to train on


class Shapes:
    """Images (1, 32, 32) with one to three boxes, full (label 0) or hollow (label 1)."""

    def __init__(self, size: int, *, seed: int):
        self._size = size
        self._seed = seed

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        rng = np.random.default_rng((self._seed, index))
        image = rng.normal(0, 0.1, (1, CELLS * PIXELS, CELLS * PIXELS))
        cells = rng.choice(CELLS * CELLS, size=rng.integers(1, 4), replace=False)
        labels = rng.integers(2, size=len(cells))
        boxes = []
        for cell, label in zip(cells, labels, strict=True):
            height, width = rng.integers(4, PIXELS, size=2)
            top = cell // CELLS * PIXELS + rng.integers(PIXELS - height)
            left = cell % CELLS * PIXELS + rng.integers(PIXELS - width)
            image[0, top : top + height, left : left + width] += 1
            if label:
                image[0, top + 1 : top + height - 1, left + 1 : left + width - 1] -= 1
            boxes.append([left, top, left + width, top + height])
        target = {"boxes": torch.tensor(boxes).float(), "labels": torch.from_numpy(labels)}
        return torch.from_numpy(image).float(), target


def collate(samples: list[Any]) -> tuple[Tensor, Targets]:
    """Images are stacked, targets stay a list: images have different numbers of boxes."""
    return torch.stack([image for image, _ in samples]), [target for _, target in samples]


def cells_of(boxes: Tensor) -> Tensor:
    """Returns which cell the centre of each box (N, 4) is in."""
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    column, row = (centres / PIXELS).long().unbind(1)
    return row * CELLS + column


class Detector(nn.Module):
    """Says of each cell whether it has a box, which, and where."""

    def __init__(self, width: int):
        super().__init__()
        sizes = (1, width, width, width)
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(sizes):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        self.body = nn.Sequential(*layers)
        self.head = nn.Conv2d(width, 1 + 2 + 4, 3, padding=1)

    def forward(self, images: Tensor, targets: Targets | None = None) -> Any:
        outputs = self.head(self.body(images)).flatten(2).transpose(1, 2)
        present, labels, corners = outputs.split([1, 2, 4], dim=2)
        boxes = corners.exp() * PIXELS
        if self.training:
            assert targets is not None
            return self.losses(present.squeeze(2), labels, boxes, targets)
        found = []
        for row, its_labels, its_boxes in zip(present.squeeze(2), labels, boxes, strict=True):
            kept = row > 0
            found.append({"boxes": its_boxes[kept], "labels": its_labels[kept].argmax(1)})
        return found

    def losses(
        self, present: Tensor, labels: Tensor, boxes: Tensor, targets: Targets
    ) -> dict[str, Tensor]:
        """Returns sums over the cells and boxes of all images."""
        images = torch.cat([torch.full_like(t["labels"], i) for i, t in enumerate(targets)])
        true_boxes = torch.cat([target["boxes"] for target in targets])
        true_labels = torch.cat([target["labels"] for target in targets])
        at = (images, cells_of(true_boxes))
        is_there = torch.zeros_like(present)
        is_there[at] = 1
        off = smooth_l1_loss(boxes[at], true_boxes, reduction="sum") / PIXELS
        return {
            "present": binary_cross_entropy_with_logits(present, is_there, reduction="sum"),
            "label": cross_entropy(labels[at], true_labels, reduction="sum"),
            "box": off,
        }


def loss(model: Detector, batch: tuple[Tensor, Targets]) -> LossSum:
    images, targets = batch
    losses = model(images, targets)
    boxes = torch.tensor(sum(len(target["labels"]) for target in targets))
    total = torch.stack(list(losses.values())).sum()
    return LossSum(total, boxes, metrics={name: (part, boxes) for name, part in losses.items()})


def found(model: Detector, batch: tuple[Tensor, Targets]) -> dict[str, tuple[Tensor, int]]:
    """Returns how many of the boxes were found: in their cell, and with the right label."""
    right = torch.zeros(())
    boxes = 0
    for said, target in zip(model(batch[0]), batch[1], strict=True):
        known = dict(zip(cells_of(said["boxes"]).tolist(), said["labels"].tolist(), strict=True))
        cells = cells_of(target["boxes"]).tolist()
        for cell, label in zip(cells, target["labels"].tolist(), strict=True):
            right += known.get(cell) == label
        boxes += len(cells)
    return {"recall": (right, boxes)}


def recipe(settings: Settings) -> Recipe:
    return Recipe(
        model=lambda: Detector(settings.width),
        loss=loss,
        optimizer=lambda model: torch.optim.AdamW(model.parameters(), lr=settings.lr),
        scheduler=lambda optimizer, total_steps: schedules.step(
            optimizer, total_steps, at=(0.7, 0.9), warmup=0.1
        ),
        train_data=lambda: Data(Shapes(settings.images, seed=0), collate),
        eval_data=lambda: Data(Shapes(128, seed=1), collate),
        evaluate=found,
    )
