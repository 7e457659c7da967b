"""After pytorch/examples' word_language_model/main.py: an LSTM that goes on where the batch before
has stopped.

    torchrun --nproc_per_node=2 -m ddp_kit.train recipes/ported/truncated_bptt.py

Kept: a text cut into as many columns as the batch has, read row after row; the hidden state carried
over without its gradient, and zero at each epoch's start; SGD with a small clip. A column is a
sample's place in the global batch, and the state of all columns is a buffer: a forward pass changes
its own columns, and `buffers=` says that the changes of all micro-batches stay.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import ddp_kit
from ddp_kit import Data, LossSum, Recipe

WORDS = ("the", "a", "small", "red", "old", "fox", "owl", "boat", "sees", "likes", "and", "then")


@dataclass(frozen=True, kw_only=True)
class Settings(ddp_kit.Settings):
    """An LSTM over characters."""

    global_batch: int = 16  # columns of the text
    epochs: int = 3
    lr: float = 5.0
    grad_clip: float = 0.25
    width: int = 64
    layers: int = 1
    rows: int = 20  # characters that gradients go back
    words: int = 6000  # of the text


def text(words: int, *, seed: int = 0) -> Tensor:
    """Returns made-up prose, the same at any seed of a run."""
    chosen = np.random.default_rng(seed).choice(WORDS, size=words)
    return torch.tensor(list(" ".join(chosen.tolist()).encode()))


class Columns:
    """Sample row * columns + column: its characters, the next ones, column, whether row is 0."""

    def __init__(self, said: Tensor, *, columns: int, rows: int):
        self._text = said[: len(said) // columns * columns].view(columns, -1)
        self._rows = rows

    def __len__(self) -> int:
        columns, length = self._text.shape
        return (length - 1) // self._rows * columns

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int, bool]:
        row, column = divmod(index, len(self._text))
        begin = row * self._rows
        piece = self._text[column, begin : begin + self._rows + 1]
        return piece[:-1], piece[1:], column, row == 0


def in_order(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.arange(size)


class Reader(nn.Module):
    def __init__(self, settings: Settings):
        super().__init__()
        self.embedding = nn.Embedding(128, settings.width)
        self.memory = nn.LSTM(settings.width, settings.width, settings.layers, batch_first=True)
        self.out = nn.Linear(settings.width, 128)
        shape = (2, settings.layers, settings.global_batch, settings.width)
        self.register_buffer("hidden", torch.zeros(shape))

    def forward(self, inputs: Tensor, columns: Tensor, is_first: Tensor) -> Tensor:
        """(B, T), (B,), (B,) -> (B, T, 128). Goes on from the columns' states."""
        if not self.training:
            return self.out(self.memory(self.embedding(inputs))[0])
        hidden, cell = self.hidden[:, :, columns] * ~is_first[:, None]
        outputs, after = self.memory(self.embedding(inputs), (hidden, cell))
        self.hidden[:, :, columns] = torch.stack(after).detach()
        return self.out(outputs)


def loss(model: Reader, batch: tuple[Tensor, ...]) -> LossSum:
    inputs, targets, columns, is_first = batch
    logits = model(inputs, columns, is_first)
    total = cross_entropy(logits.transpose(1, 2), targets, reduction="sum")
    return LossSum(total, targets.numel())


def recipe(settings: Settings) -> Recipe:
    return Recipe(
        model=lambda: Reader(settings),
        loss=loss,
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=settings.lr),
        train_data=lambda: Data(
            Columns(text(settings.words), columns=settings.global_batch, rows=settings.rows),
            order=in_order,
        ),
        eval_data=lambda: Columns(text(600, seed=1), columns=4, rows=200),
        buffers={"hidden": "sum"},
    )
