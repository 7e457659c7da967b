"""A generative adversarial network on MNIST: two models, two optimizers, two losses; its images as
a grid at each evaluation.

    torchrun --nproc_per_node=2 -m ddp_kit.train recipes/gan.py --data-root data \
        --tracker tensorboard

The grid goes to the trackers that show images: view it with tensorboard --logdir runs, or type
--tracker wandb.

After 1,716 steps (4 epochs) digits can be read. The Frechet distance of 5,000 new images to the
5,000 for validation falls to 0.095: untrained 7.7, all images alike (their mean) 1.4, as many real
ones instead 0.005. It is one of means of 4 x 4 pixels, and cannot be compared with those that an
Inception network gives. 167 s of processor time over both ranks. 2 ranks on 2 CPU cores, torch
2.15.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, softplus
from torch.optim import Adam

import ddp_kit
from ddp_kit import LossSum, Objective, Recipe
from ddp_kit.data.known import mnist
from ddp_kit.errors import ConfigError
from ddp_kit.settings import EarlyStop

GRID = 8  # images in a row and in a column of the grid
MEAN, STD = 0.1307, 0.3081  # of mnist()'s pixels, which it has shifted and scaled


@dataclass(frozen=True, kw_only=True)
class Settings(ddp_kit.Settings):
    """A generative adversarial network on MNIST."""

    global_batch: int = 128
    micro_batch: int = (
        32  # the noise is drawn for a micro-batch: the same numbers on 1, 2 and 4 ranks
    )
    epochs: int = 4
    early_stop: EarlyStop = field(
        default_factory=lambda: EarlyStop(metric="frechet")
    )  # no improvement in 5 evaluations
    ema: float = 0.99  # of the weights: the images are of the average
    lr: float = 2e-3  # learning rate of both
    noise: int = 64  # numbers that an image is made from
    width: int = 16  # channels next to the image, in both networks
    data_root: str = "data"  # folder that holds MNIST/raw
    download: bool = False  # fetch MNIST if it is not there


class Gan(nn.Module):
    """Source: Radford et al., "Deep convolutional generative adversarial networks", arXiv
    1511.06434; GroupNorm in place of BatchNorm.
    """

    def __init__(self, *, noise: int, width: int):
        super().__init__()
        self.noise = noise
        self.generator = nn.Sequential(
            nn.Linear(noise, 2 * width * 7 * 7),
            nn.Unflatten(1, (2 * width, 7, 7)),
            nn.GroupNorm(4, 2 * width),
            nn.ReLU(),
            nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1),
            nn.GroupNorm(4, width),
            nn.ReLU(),
            nn.ConvTranspose2d(width, 1, 4, stride=2, padding=1),
            nn.Sigmoid(),
        )
        self.discriminator = nn.Sequential(
            nn.Conv2d(1, width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
            nn.GroupNorm(4, 2 * width),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
            nn.Linear(2 * width * 7 * 7, 1),
        )

    def images(self, count: int) -> Tensor:
        """Returns new images (count, 1, 28, 28), pixels from 0 to 1, of noise from torch's
        generator, seeded for each step.
        """
        like = next(self.generator.parameters())
        made: Tensor = self.generator(
            torch.randn(count, self.noise, device=like.device, dtype=like.dtype)
        )
        return made


def pixels(batch: tuple[Tensor, Tensor]) -> Tensor:
    """Returns a batch's images with pixels from 0 to 1."""
    return batch[0] * STD + MEAN


def tell_apart(model: Gan, batch: tuple[Tensor, Tensor]) -> LossSum:
    """The discriminator's loss.

    Source: Goodfellow et al., "Generative adversarial nets", arXiv 1406.2661, here with logits.
    """
    real = model.discriminator(pixels(batch))
    fake = model.discriminator(model.images(len(batch[0])))
    right = (real > 0).sum() + (fake <= 0).sum()
    return LossSum(
        softplus(-real).sum() + softplus(fake).sum(),
        len(real),
        metrics={"accuracy": (right, 2 * len(real))},
    )


def be_taken_for_real(model: Gan, batch: tuple[Tensor, Tensor]) -> LossSum:
    """The generator's loss, the one that does not saturate. Source: the same, section 3."""
    fake = model.discriminator(model.images(len(batch[0])))
    return LossSum(softplus(-fake).sum(), len(fake))


def features(model: Gan, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Returns rows (B, 49) of real and of new images: how bright each square of 4 x 4 pixels is."""
    real = pixels(batch)
    return {
        name: avg_pool2d(images, 4).flatten(1)
        for name, images in (("real", real), ("fake", model.images(len(real))))
    }


def frechet(means: dict[str, float], rows: Mapping[str, Tensor]) -> dict[str, float]:
    """Returns the Frechet distance of two normal distributions with the rows' means and
    covariances.

    Source: Heusel et al., "GANs trained by a two time-scale update rule", arXiv 1706.08500,
    equation 6.
    """
    real, fake = rows["real"].double(), rows["fake"].double()
    values, vectors = torch.linalg.eigh(real.T.cov())
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    shared = torch.linalg.eigvalsh(root @ fake.T.cov() @ root).clamp(min=0).sqrt().sum()
    spread = real.var(0).sum() + fake.var(0).sum() - 2 * shared
    return {"frechet": float((real.mean(0) - fake.mean(0)).square().sum() + spread)}


def grid(model: Gan) -> dict[str, Tensor]:
    """Returns one image (1, 224, 224) of new ones, from the same noise at each evaluation."""
    return {
        "digits": model.images(GRID * GRID)
        .view(GRID, GRID, 28, 28)
        .transpose(1, 2)
        .reshape(1, GRID * 28, GRID * 28)
    }


def recipe(settings: Settings) -> Recipe:
    if settings.width < 4 or settings.width % 4 or settings.noise < 1:
        raise ConfigError(
            f"--width {settings.width} --noise {settings.noise}: expected a multiple of 4, "
            "and at least 1."
        )

    def adam(part: nn.Module) -> Adam:
        return Adam(part.parameters(), lr=settings.lr, betas=(0.5, 0.999))

    return Recipe(
        model=lambda: Gan(noise=settings.noise, width=settings.width),
        objectives=[
            Objective(loss=tell_apart, optimizer=adam, trains="discriminator"),
            Objective(loss=be_taken_for_real, optimizer=adam, trains="generator"),
        ],
        train_data=lambda: mnist(settings.data_root, "train", download=settings.download),
        eval_data=lambda: mnist(settings.data_root, "validation", download=settings.download),
        evaluate=features,
        summarize=frechet,
        samples=grid,
    )
