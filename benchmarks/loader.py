"""Samples/s of ddp_kit's feed against torch's DataLoader: in-memory CIFAR augmented by the batch or
by torchvision for each sample, data sets that answer one sample at a time, and streams.

    python benchmarks/loader.py [--rounds 5] [--seconds 1.0]

One process and one thread each, in turn within a run; uint8 images of CIFAR's shape, batches of
128. "augmented" is a crop of a padded image, a flip and normalisation; "plain" samples are float
tensors that are only looked up. Prints median, min-max, and the ratio to DataLoader round by round.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Iterator
from itertools import count
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset
from torchvision.transforms import v2

from ddp_kit import build_loader, process_group
from ddp_kit.data.images import ImageArray

SAMPLES, BATCH, PADDING = 50_000, 128, 4
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
Batches = Iterator[tuple[Tensor, Tensor]]


class PerSample(Dataset[tuple[Tensor, int]]):
    """The data set as torchvision's documentation writes it."""

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        self.images = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        self.labels = labels.tolist()
        self.transform = v2.Compose(
            [
                v2.RandomCrop(32, padding=PADDING),
                v2.RandomHorizontalFlip(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), self.labels[index]


class Plain(Dataset[tuple[Tensor, int]]):
    """Float images, looked up one at a time."""

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        self.images = torch.from_numpy(images).permute(0, 3, 1, 2).float().div(255).contiguous()
        self.labels = labels.tolist()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], self.labels[index]


class Stream(IterableDataset[tuple[Tensor, int]]):
    """The same samples one after another."""

    def __init__(self, plain: Plain):
        self.plain = plain

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        return (self.plain[index] for index in range(len(self.plain)))


def torch_batches(dataset: Dataset[Any]) -> Batches:
    for epoch in count():
        if isinstance(dataset, IterableDataset):
            yield from DataLoader(dataset, batch_size=BATCH, drop_last=True)
            continue
        sampler: DistributedSampler[int] = DistributedSampler(dataset, num_replicas=1, rank=0)
        sampler.set_epoch(epoch)
        yield from DataLoader(dataset, batch_size=BATCH, sampler=sampler, drop_last=True)


def our_batches(dataset: Any) -> Batches:
    with process_group(device="cpu") as group:  # of one process: none is made
        for batch in build_loader(dataset, group=group, global_batch=BATCH).batches(
            start=0, end=2**40
        ):
            yield batch.micro_batches[0].batch


def pairs(images: np.ndarray, labels: np.ndarray) -> Iterator[tuple[str, Batches, Batches, float]]:
    """Yields (name, DataLoader's batches, ours, the least that ours should reach of DataLoader's;
    0: no target yet).
    """
    plain = Plain(images[:10_000], labels[:10_000])
    per_sample = PerSample(images, labels)
    by_batch = ImageArray(images, labels, mean=MEAN, std=STD, crop_padding=PADDING, flip=True)
    yield "augmented by the batch", torch_batches(per_sample), our_batches(by_batch), 20.0
    yield "augmented for each sample", torch_batches(per_sample), our_batches(per_sample), 0.0
    yield "plain single samples", torch_batches(plain), our_batches(plain), 0.0
    yield "plain stream", torch_batches(Stream(plain)), our_batches(Stream(plain)), 0.0


def samples_per_s(batches: Batches, *, seconds: float) -> float:
    samples, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        images, labels = next(batches)
        assert images.shape == (BATCH, 3, 32, 32), images.shape
        assert images.dtype == torch.float32, images.dtype
        samples += len(labels)
    return samples / (time.perf_counter() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="per contender and round")
    options = parser.parse_args()
    torch.set_num_threads(1)
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (SAMPLES, 32, 32, 3), dtype=np.uint8)
    labels = random.integers(0, 10, SAMPLES)
    contenders = list(pairs(images, labels))
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name, *_ in contenders}
    for round_ in range(options.rounds + 1):
        for name, theirs, ours, _ in contenders:
            found = tuple(
                samples_per_s(batches, seconds=options.seconds) for batches in (theirs, ours)
            )
            if round_:  # the first round warms up
                rates[name].append(found)
    print(
        f"torch {torch.__version__}, torchvision {torchvision.__version__}, {platform.machine()}, "
        f"1 thread, {options.rounds} rounds"
    )
    print(f"{'data':28} {'DataLoader: samples/s':32} {'ddp_kit':32} ratio")
    for name, _, _, target in contenders:
        columns = [spread([pair[i] for pair in rates[name]]) for i in (0, 1)]
        ratios = [ours / theirs for theirs, ours in rates[name]]
        asked = f"; target {target:g} or more" if target else ""
        print(
            f"{name:28} {columns[0]:32} {columns[1]:32} "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}){asked}"
        )


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):,.0f} ({min(values):,.0f}-{max(values):,.0f})"


if __name__ == "__main__":
    main()
