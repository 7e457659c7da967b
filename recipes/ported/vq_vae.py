"""After vq-vae-2-pytorch's vqvae.py (K. Seonghyeon; A. van den Oord et al.): images as codes out of
a codebook that follows what it stands for.

    torchrun --nproc_per_node=2 -m ddp_kit.train recipes/ported/vq_vae.py

Kept: the straight-through gradient, the commitment term, a codebook moved by averages of what was
assigned to each code. The two averages are buffers, and the codes are their quotient. Each forward
pass moves them by what it sees; `buffers=` says that the mean of all micro-batches, on all ranks,
is what stays of them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

import ddp_kit
from ddp_kit import LossSum, Recipe
from ddp_kit.data.known import digits


@dataclass(frozen=True, kw_only=True)
class Settings(ddp_kit.Settings):
    """Digits as 16 codes each."""

    global_batch: int = 64
    epochs: int = 10
    lr: float = 2e-3
    width: int = 16  # of a code
    codes: int = 32
    decay: float = 0.95  # of the codebook's averages
    commitment: float = 0.25


class Codebook(nn.Module):
    def __init__(self, settings: Settings):
        super().__init__()
        self.decay = settings.decay
        self.register_buffer("sizes", torch.ones(settings.codes))
        self.register_buffer("sums", torch.randn(settings.codes, settings.width))

    def codes(self) -> Tensor:
        """Returns (codes, width). No code is ever quite without images."""
        whole = self.sizes.sum()
        smoothed = (self.sizes + 1e-5) / (whole + len(self.sizes) * 1e-5) * whole
        return self.sums / smoothed.unsqueeze(1)

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """(B, places, width) -> the nearest codes, and their indices (B, places)."""
        codes = self.codes()
        chosen = torch.cdist(states.detach().flatten(0, 1), codes).argmin(1).view(states.shape[:2])
        if self.training:
            self.follow(states.detach(), chosen)
        return codes[chosen], chosen

    def follow(self, states: Tensor, chosen: Tensor) -> None:
        """Moves the averages towards what an image has of each code."""
        places = one_hot(chosen, len(self.sizes)).to(states)
        size = places.sum(1).mean(0)
        total = torch.einsum("bpc,bpw->cw", places, states) / len(states)
        self.sizes.lerp_(size, 1 - self.decay)
        self.sums.lerp_(total, 1 - self.decay)


class VqVae(nn.Module):
    def __init__(self, settings: Settings):
        super().__init__()
        width = settings.width
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 32, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, width, 3, padding=1),
        )
        self.codebook = Codebook(settings)
        self.decoder = nn.Sequential(
            nn.Conv2d(width, 32, 3, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(32, 1, 4, stride=2, padding=1),
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns new images, the distances to the codes (B,), and the codes' indices."""
        states = self.encoder(images)
        rows = states.flatten(2).transpose(1, 2)
        codes, chosen = self.codebook(rows)
        off = (codes.detach() - rows).square().mean((1, 2))
        straight = rows + (codes - rows).detach()
        return self.decoder(straight.transpose(1, 2).reshape(states.shape)), off, chosen


def loss(model: VqVae, batch: tuple[Tensor, Tensor], commitment: float) -> LossSum:
    images = batch[0]
    made, off, _ = model(images)
    error = (made - images).square().mean((1, 2, 3))
    metrics = {"error": (error.sum(), len(images)), "off": (off.sum(), len(images))}
    return LossSum((error + commitment * off).sum(), len(images), metrics=metrics)


def recipe(settings: Settings) -> Recipe:
    return Recipe(
        model=lambda: VqVae(settings),
        loss=lambda model, batch: loss(model, batch, settings.commitment),
        optimizer=lambda model: torch.optim.Adam(model.parameters(), lr=settings.lr),
        train_data=lambda: digits("train"),
        eval_data=lambda: digits("validation"),
        buffers={"codebook.sizes": "mean", "codebook.sums": "mean"},
    )
