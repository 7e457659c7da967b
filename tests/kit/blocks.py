"""A model that can be split: blocks, LayerNorm, tied weights, a part that is frozen, a parameter that belongs to no layer."""

from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from cases import Settings, Trace, classify, recipe, trace, vectors
from torch import nn

from ddp_kit import Data, Recipe
from ddp_kit.distributed.local_shard import whole
from ddp_kit.distributed.process_group import Group
from ddp_kit.setup.build import build
from ddp_kit.training.step import train_step

ROWS = 18  # by no number of ranks but 1, 2, 3 and 6 divisible: parts are uneven on 4


@dataclass(frozen=True, kw_only=True)
class Split(Settings):
    """50 steps, clipped, averaged."""

    max_steps: int = 50
    grad_clip: float = 0.05
    ema: float = 0.9
    lr: float = 0.01


class Block(nn.Module):
    """A layer beside a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + torch.tanh(self.layer(self.norm(hidden)))


class Net(nn.Module):
    """`first` and `again` are one tensor."""

    def __init__(self, width: int = ROWS) -> None:
        super().__init__()
        self.first = nn.Linear(6, width, bias=False)
        self.again = nn.Linear(6, width, bias=False)
        self.again.weight = self.first.weight
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))
        self.frozen = nn.Linear(width, width).requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(1))
        self.last = nn.Linear(width, 4)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = self.first(inputs) + self.again(inputs.square())
        for block in self.blocks:
            hidden = block(hidden)
        return self.last(hidden + self.frozen(hidden)) * self.scale


def adamw(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Two groups with different rates and decay."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    plain = [p for name, p in named if name.endswith("bias")]
    rest = [p for name, p in named if not name.endswith("bias")]
    return torch.optim.AdamW(
        [{"params": rest}, {"params": plain, "weight_decay": 0.0, "lr": 2 * lr}], lr=lr
    )


def split(settings: Split, **parts: Any) -> Recipe:
    given = {
        "model": Net,
        "loss": classify,
        "optimizer": lambda model: adamw(model, settings.lr),
        "eval_data": lambda: vectors(50),
    }
    return recipe(settings, **(given | parts))


def half_the_median_norm(group: Group, settings: Split) -> float:
    """What clips half of the steps and more: a norm that was taken over a rank's part only would show."""
    made = build(
        split(settings), replace(settings, grad_clip=1e9, strategy="ddp", comm="fp32"), group
    )
    norms = [
        float(train_step(made.training, batch).grad_norms[""])
        for batch in made.feed.batches(start=0, end=settings.max_steps)
    ]
    made.training.control_packet.close()
    return median(norms) / 2


def averages(training: Any) -> dict[str, torch.Tensor]:
    """Returns the whole EMA by name."""
    with training.average.applied():
        return {name: whole(tensor).clone() for name, tensor in training.model.named_parameters()}


__all__ = ["Data", "Net", "Split", "Trace", "averages", "half_the_median_norm", "split", "trace"]
