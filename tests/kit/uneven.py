"""A recipe in which one rank, from `--at-step` on, does not use the model as the others do; all blocks have the same size."""

from dataclasses import dataclass

import torch
from cases import classify, vectors
from faulty import Settings as Faulty
from faulty import Trouble
from torch import nn

from ddp_kit import Recipe


@dataclass(frozen=True, kw_only=True)
class Settings(Faulty):
    """`--fault`: which blocks are called, or what of them is left out."""


class Block(nn.Module):
    """Two layers beside a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, hidden: torch.Tensor, *, is_part: bool) -> torch.Tensor:
        hidden = hidden + self.a(hidden).relu()
        return hidden if is_part else hidden + self.b(hidden)


class Net(nn.Module):
    """Four blocks between two layers."""

    def __init__(self, trouble: Trouble) -> None:
        super().__init__()
        self.first, self.blocks, self.last = (
            nn.Linear(6, 8),
            nn.ModuleList(Block() for _ in range(4)),
            nn.Linear(8, 4),
        )
        self.trouble = trouble

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden, trouble = self.first(inputs), self.trouble
        order = {"skip": (0, 2, 3), "swap": (0, 2, 1, 3), "end early": (0, 1, 2)}.get(
            trouble.settings.fault, (0, 1, 2, 3)
        )
        for i in order if trouble.is_due(trouble.settings.fault) else range(4):
            hidden = self.blocks[i](hidden, is_part=i == 1 and trouble.is_due("part"))
            if i == 1 and trouble.is_due("detach"):
                hidden = hidden.detach() + 0 * self.first(inputs)
            if i == 1 and trouble.is_due("cut"):
                hidden = hidden.detach()
        logits: torch.Tensor = self.last(hidden)
        return logits


def recipe(settings: Settings) -> Recipe:
    trouble = Trouble(settings)
    return Recipe(
        model=lambda: Net(trouble),
        loss=classify,
        optimizer=lambda model: torch.optim.AdamW(model.parameters(), lr=0.01),
        train_data=vectors,
        callbacks=[trouble],
    )
