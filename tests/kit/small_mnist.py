"""A small MNIST in its layout, made anew: 28 x 28 images of a class's own bar, on noise."""

from pathlib import Path

import numpy as np


def write_small_mnist(root: Path, *, train: int = 6000, test: int = 100) -> Path:
    """Writes images and labels under root/MNIST/raw; 5,000 of `train` are held out for validation, as always. Returns `root`."""
    rng = np.random.default_rng(0)
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", train), ("t10k", test)):
        labels = rng.integers(10, size=count).astype(np.uint8)
        images = rng.integers(40, size=(count, 28, 28)).astype(np.uint8)
        lengths = rng.integers(8, 20, size=count)  # of the bars: how much ink there is
        for image, label, length in zip(images, labels, lengths, strict=True):
            image[label * 2 : label * 2 + 6, 4 : 4 + length] += 150
        for name, kind, array in (
            ("images-idx3-ubyte", 3, images),
            ("labels-idx1-ubyte", 1, labels),
        ):
            head = b"".join(int(size).to_bytes(4, "big") for size in (0x0800 + kind, *array.shape))
            (raw / f"{part}-{name}").write_bytes(head + array.tobytes())
    return root
