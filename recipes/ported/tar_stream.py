"""After WebDataset's examples (T. Breuel): samples read one after another out of tar files.

    torchrun --nproc_per_node=2 -m ddp_kit.train recipes/ported/tar_stream.py

Kept: files of one name in a tar file are a sample, shards in another order each epoch, a buffer
that shuffles. Left out: splitting by node and by worker. Each rank reads the stream from its start
and keeps its share, so order and numbers are those of one process. The shards are made once, of
digits.
"""

import io
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import IterableDataset

import ddp_kit
from ddp_kit import LossSum, Recipe, first_on_node
from ddp_kit.data.known import digits

SHARDS = 6


@dataclass(frozen=True, kw_only=True)
class Settings(ddp_kit.Settings):
    """Digits out of tar files."""

    global_batch: int = 64
    epochs: int = 5
    lr: float = 2e-3
    samples: int = 1437  # that are written into the shards, at most
    buffer: int = 200  # samples that are shuffled among each other
    data_root: str = "data"  # where the shards are, or are made


def write_shards(folder: Path, samples: int) -> None:
    """Writes the training digits as shards: of each sample NUMBER.npy and NUMBER.cls."""
    folder.mkdir()
    images, labels = digits("train").pixels()
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:04}.tar", "w") as archive:
            for number in range(shard, samples, SHARDS):
                content = io.BytesIO()
                np.save(content, images[number])
                add(archive, f"{number:06}.npy", content.getvalue())
                add(archive, f"{number:06}.cls", str(labels[number]).encode())


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    about = tarfile.TarInfo(name)
    about.size = len(content)
    archive.addfile(about, io.BytesIO(content))


def samples_of(path: Path) -> Iterator[dict[str, bytes]]:
    """Yields the samples of a shard: neighbouring files of one name, by their suffixes."""
    sample: dict[str, bytes] = {}
    name = ""
    with tarfile.open(path) as archive:
        for about in archive:
            stem, _, suffix = about.name.partition(".")
            if stem != name and sample:
                yield sample
                sample = {}
            name = stem
            content = archive.extractfile(about)
            assert content is not None
            sample[suffix] = content.read()
    if sample:
        yield sample


class Stream(IterableDataset[Any]):
    """Pairs of an image (1, 8, 8) and a label, in an order that depends on seed and epoch alone."""

    def __init__(self, folder: Path, *, size: int, seed: int, buffer: int):
        self._shards = sorted(folder.glob("*.tar"))
        self._size = size
        self._seed = seed
        self._buffer = buffer
        self._epoch = 0

    def __len__(self) -> int:
        return self._size

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        rng = np.random.default_rng((self._seed, self._epoch))
        for sample in self._shuffled(self._read(rng.permutation(len(self._shards))), rng):
            pixels = np.load(io.BytesIO(sample["npy"]), allow_pickle=False)
            yield torch.from_numpy(pixels).permute(2, 0, 1) / 255 - 0.3, int(sample["cls"])

    def _read(self, order: Iterable[int]) -> Iterator[dict[str, bytes]]:
        for shard in order:
            yield from samples_of(self._shards[shard])

    def _shuffled(self, samples: Iterator[Any], rng: np.random.Generator) -> Iterator[Any]:
        kept: list[Any] = []
        for sample in samples:
            if len(kept) < self._buffer:
                kept.append(sample)
                continue
            place = rng.integers(len(kept))
            yield kept[place]
            kept[place] = sample
        yield from kept


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> LossSum:
    images, labels = batch
    logits = model(images)
    right = (logits.argmax(1) == labels).sum()
    total = cross_entropy(logits, labels, reduction="sum")
    return LossSum(total, len(labels), metrics={"accuracy": (right, len(labels))})


def recipe(settings: Settings) -> Recipe:
    def stream() -> Stream:
        folder = Path(settings.data_root) / f"digits-{settings.samples}"
        first_on_node(folder, lambda temporary: write_shards(temporary, settings.samples))
        return Stream(folder, size=settings.samples, seed=settings.seed, buffer=settings.buffer)

    return Recipe(
        model=lambda: nn.Sequential(
            nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)
        ),
        loss=loss,
        optimizer=lambda model: torch.optim.Adam(model.parameters(), lr=settings.lr),
        train_data=stream,
    )
