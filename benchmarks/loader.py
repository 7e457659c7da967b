"""Samples/s of the augmented in-memory CIFAR feed, against torch's DataLoader with per-sample torchvision transforms.

    python benchmarks/loader.py [--rounds 5] [--seconds 1.0]

One process and one thread each, in turn within a run; uint8 images of CIFAR's shape, crop of a padded image, flip, normalisation,
batches of 128. Both feeds end in float tensors and labels. Prints median, min-max, and the ratio round by round.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import count

import numpy as np
import torch
import torchvision
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision.transforms import v2

from ddp_kit import build_loader, process_group
from ddp_kit.data.images import ImageArray

SAMPLES, BATCH, PADDING = 50_000, 128, 4
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
Batches = Iterator[tuple[Tensor, Tensor]]


class PerSample(Dataset[tuple[Tensor, int]]):
    """The data set as torchvision's documentation writes it."""

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        self.images, self.labels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), labels.tolist()
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


def torch_batches(images: np.ndarray, labels: np.ndarray) -> Batches:
    dataset = PerSample(images, labels)
    sampler: DistributedSampler[int] = DistributedSampler(dataset, num_replicas=1, rank=0)
    for epoch in count():
        sampler.set_epoch(epoch)
        yield from DataLoader(dataset, batch_size=BATCH, sampler=sampler, drop_last=True)


def our_batches(images: np.ndarray, labels: np.ndarray) -> Batches:
    data = ImageArray(images, labels, mean=MEAN, std=STD, crop_padding=PADDING, flip=True)
    with process_group(device="cpu") as group:  # of one process: none is made
        for batch in build_loader(data, group=group, global_batch=BATCH).batches(start=0, end=2**40):
            yield batch.micro_batches[0].batch


def samples_per_s(batches: Batches, *, seconds: float) -> float:
    samples, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        images, labels = next(batches)
        assert images.shape == (BATCH, 3, 32, 32), images.shape
        assert images.dtype == torch.float32, images.dtype
        samples += len(labels)
    return samples / (time.perf_counter() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="per contender and round")
    options = parser.parse_args()
    torch.set_num_threads(1)
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (SAMPLES, 32, 32, 3), dtype=np.uint8)
    labels = random.integers(0, 10, SAMPLES)
    make: dict[str, Callable[[np.ndarray, np.ndarray], Batches]] = {"DataLoader": torch_batches, "ddp_kit": our_batches}
    contenders = {name: start(images, labels) for name, start in make.items()}
    for batches in contenders.values():  # a round for warming up
        samples_per_s(batches, seconds=options.seconds / 2)
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(options.rounds):
        for name, batches in contenders.items():
            rates[name].append(samples_per_s(batches, seconds=options.seconds))
    print(f"torch {torch.__version__}, torchvision {torchvision.__version__}, {platform.machine()}, 1 thread, {options.rounds} rounds")
    for name, found in rates.items():
        print(f"{name:12} {statistics.median(found):9,.0f} samples/s ({min(found):,.0f} - {max(found):,.0f})")
    ratios = [ours / theirs for ours, theirs in zip(rates["ddp_kit"], rates["DataLoader"], strict=True)]
    print(f"ratio        {statistics.median(ratios):9.1f} ({min(ratios):.1f} - {max(ratios):.1f}); target 20 or more")


if __name__ == "__main__":
    main()
