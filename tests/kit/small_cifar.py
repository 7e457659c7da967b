"""CIFAR-10 in its layout of folders, with images that a class can be told from: by a colour, and by the height of a stripe."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddp_kit.data import known
from ddp_kit.data.known import CIFAR10_CLASSES

HELD_OUT = 120  # of the training images, instead of 5,000


def make(root: Path, *, train: int = 76, test: int = 10) -> Path:
    """Writes `train` and `test` images a class under root/cifar10. Returns `root`."""
    rng = np.random.default_rng(0)
    for part, count in (("train", train), ("test", test)):
        for label, name in enumerate(CIFAR10_CLASSES):
            folder = root / "cifar10" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(60, size=(32, 32, 3)).astype(np.uint8)
                pixels += np.array([label % 3, label // 3 % 3, label // 9], np.uint8) * np.uint8(60)
                pixels[label * 3 : label * 3 + 5, :, 2] += 60
                Image.fromarray(pixels).save(folder / f"{i:04}.png")
    return root


@pytest.fixture(scope="session")
def cifar_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `--data-root` names."""
    return make(tmp_path_factory.mktemp("data"))


@pytest.fixture
def few_are_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Holds `HELD_OUT` training images out, in this process and in the ranks that it starts."""
    monkeypatch.setattr(known, "VALIDATION", HELD_OUT)
    monkeypatch.setenv("HELD_OUT", str(HELD_OUT))
