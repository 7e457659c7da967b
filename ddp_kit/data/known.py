"""Three data sets that everybody knows, as `ImageArray`s with fixed splits.

They are scikit-learn's digits, MNIST and CIFAR-10. Validation images are taken from the training
set by a keyed permutation: the same on every machine and for every seed. Test images are looked at
for the "test" split alone, and nothing is downloaded unless it was asked for.
"""

import struct
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ddp_kit.data.cache import decoded_folder
from ddp_kit.data.first_on_node import cache_path, first_on_node
from ddp_kit.data.images import ImageArray
from ddp_kit.data.seeding import Purpose, key, keys
from ddp_kit.errors import ConfigError, DataError, require

Split = Literal["train", "validation", "test"]

DIGITS_VALIDATION = 360
VALIDATION = 5000
CIFAR10_CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
# Magic numbers of IDX files: unsigned bytes in three dimensions, in one.
IDX_IMAGES = 0x803
IDX_LABELS = 0x801


def digits(split: Literal["train", "validation"]) -> ImageArray:
    """The 1,797 handwritten digits (8 x 8, grey) that ship inside scikit-learn.

    They are 1,437 to train on and 360 for validation.

    Returns: images (B, 1, 8, 8), about zero mean and unit deviation.
    Raises: MissingPackageError without scikit-learn; ConfigError for another split: the set is too
        small for a third.
    """
    if split not in ("train", "validation"):
        raise ConfigError(f'digits has no split "{split}"; expected "train" or "validation".')
    package = _package_of_scikit_learn()
    table = np.loadtxt(package / "datasets" / "data" / "digits.csv.gz", delimiter=",")
    # 0..16 in the file, 0..240 here, exactly.
    images = (table[:, :-1] * 15).astype(np.uint8).reshape(-1, 8, 8, 1)
    labels = table[:, -1].astype(np.int64)
    data = ImageArray(images, labels, mean=(0.2873,), std=(0.3539,))
    return _part(data, split, held_out=DIGITS_VALIDATION)


def _package_of_scikit_learn() -> Path:
    """Returns the folder of the package, found without importing it where that is possible.

    Importing scikit-learn takes seconds, as long as training on its digits.
    """
    spec = find_spec("sklearn")
    if spec and spec.origin:
        return Path(spec.origin).parent
    return Path(str(require("sklearn", extra="recipes").__file__)).parent


def mnist(root: str | Path, split: Split, *, download: bool = False) -> ImageArray:
    """MNIST (28 x 28, grey) from torchvision's layout `root`/MNIST/raw.

    It is 55,000 images to train on, 5,000 for validation, 10,000 for the test. The files are
    memory-mapped as they are, one copy for all ranks of a node. With `download`, one rank a node
    fetches what is not there.

    Returns: images (B, 1, 28, 28), about zero mean and unit deviation.
    Raises: ConfigError for another split; DataError if the files are not there or not MNIST's.
    """
    _check_split(split)
    folder = Path(root) / "MNIST"
    if download:
        first_on_node(folder, _download_mnist)
    prefix = "t10k" if split == "test" else "train"
    images_file = folder / "raw" / f"{prefix}-images-idx3-ubyte"
    labels_file = folder / "raw" / f"{prefix}-labels-idx1-ubyte"
    missing = [file for file in (images_file, labels_file) if not file.is_file()]
    if missing:
        raise _not_found("MNIST", missing)
    images = _read_idx(images_file, magic=IDX_IMAGES)
    labels = _read_idx(labels_file, magic=IDX_LABELS)
    data = ImageArray(images[..., None], labels.astype(np.int64), mean=(0.1307,), std=(0.3081,))
    if split == "test":
        return data
    return _part(data, split, held_out=VALIDATION)


def cifar10(
    root: str | Path,
    split: Split,
    *,
    download: bool = False,
    crop_padding: int = 4,
    flip: bool = True,
) -> ImageArray:
    """CIFAR-10 (32 x 32, colour, 10 classes), cropped and flipped in training.

    It is 45,000 images to train on, 5,000 for validation, 10,000 for the test. It is looked for as
    image folders, `root`/cifar10/{train,test}/<class>/*.jpg, then in torchvision's own layout,
    `root`/cifar-10-batches-py; decoded once a node into a file beside them, which all its ranks
    map. With `download`, one rank a node fetches what is not there. The two layouts order the
    images differently, so each has its own validation images.

    Returns: images (B, 3, 32, 32), about zero mean and unit deviation.
    Raises: ConfigError for another split; DataError if neither layout is there or a file is
    damaged.
    """
    _check_split(split)
    part: Literal["train", "test"] = "test" if split == "test" else "train"
    folder = Path(root) / "cifar10" / part
    batches = Path(root) / "cifar-10-batches-py"
    if not folder.is_dir() and download:
        first_on_node(batches, _download_cifar10)
    if folder.is_dir():
        found = decoded_folder(folder)
        images = found.images
        labels = found.labels
        classes = found.classes
    elif batches.is_dir():
        images, labels = _cifar10_batches(batches, part)
        classes = CIFAR10_CLASSES
    else:
        raise _not_found("CIFAR-10", [folder, batches])
    data = ImageArray(
        images,
        labels,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        crop_padding=crop_padding,
        flip=flip,
        classes=classes,
    )
    if split == "test":
        return data
    return _part(data, split, held_out=VALIDATION)


def _check_split(split: str) -> None:
    if split not in ("train", "validation", "test"):
        raise ConfigError(f'There is no split "{split}"; expected "train", "validation" or "test".')


def _part(data: ImageArray, split: str, *, held_out: int) -> ImageArray:
    if len(data) <= held_out:
        raise DataError(
            f"The training set has {len(data)} images; "
            f"expected are more than the {held_out} to hold out."
        )
    order = np.argsort(keys(key(0, Purpose.SPLIT), np.arange(len(data))), kind="stable")
    own = order[:held_out] if split == "validation" else order[held_out:]
    return data.subset(np.sort(own))


def _not_found(name: str, looked: list[Path]) -> DataError:
    places = "\n".join(f"  {place.absolute()}" for place in looked)
    return DataError(
        f"{name} was not found. Looked for:\n{places}\n"
        "Type: --data-root DIR, or --download to fetch it."
    )


def _read_idx(file: Path, *, magic: int) -> NDArray[np.uint8]:
    """Returns the array of an IDX file of bytes, memory-mapped.

    Source: LeCun's MNIST page, "file formats".
    """
    dimensions = magic & 0xFF
    start = 4 + 4 * dimensions
    with file.open("rb") as opened:
        head = opened.read(start)
    if len(head) < start or struct.unpack(">I", head[:4])[0] != magic:
        raise DataError(
            f"{file} is no IDX file of {dimensions} dimensions. "
            "Delete it and unpack or download it again."
        )
    shape: tuple[int, ...] = struct.unpack(f">{dimensions}I", head[4:])
    size = file.stat().st_size
    wanted = start + int(np.prod(shape))
    if size != wanted:
        raise DataError(
            f"{file} has {size} bytes; its head says {wanted}. "
            "Delete it and unpack or download it again."
        )
    return np.memmap(file, np.uint8, mode="r", offset=start, shape=shape)


def _cifar10_batches(
    batches: Path, part: Literal["train", "test"]
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Reads torchvision's layout once a node, into a folder of two mapped arrays."""

    def make(temporary: Path) -> None:
        datasets = require("torchvision.datasets", extra="recipes")
        try:
            read = datasets.CIFAR10(str(batches.parent), train=part == "train", download=False)
        except RuntimeError as error:
            raise DataError(
                f"{batches} is damaged: {error} Delete it and unpack or download it again."
            ) from error
        temporary.mkdir()
        np.save(temporary / "images.npy", read.data)
        np.save(temporary / "labels.npy", np.asarray(read.targets, np.int64))

    folder = first_on_node(cache_path(batches, f"{batches.name}.decoded-{part}"), make)
    images = np.load(folder / "images.npy", mmap_mode="r", allow_pickle=False)
    return images, np.load(folder / "labels.npy", allow_pickle=False)


def _download_mnist(temporary: Path) -> None:
    datasets = require("torchvision.datasets", extra="recipes")
    _fetch("MNIST", lambda: datasets.MNIST(str(temporary), download=True))
    (temporary / "MNIST" / "raw").rename(temporary / "raw")
    (temporary / "MNIST").rmdir()


def _download_cifar10(temporary: Path) -> None:
    datasets = require("torchvision.datasets", extra="recipes")
    _fetch("CIFAR-10", lambda: datasets.CIFAR10(str(temporary), download=True))
    inner = temporary / "cifar-10-batches-py"
    for file in inner.iterdir():
        file.rename(temporary / file.name)
    inner.rmdir()
    (temporary / "cifar-10-python.tar.gz").unlink()


def _fetch(name: str, download: Callable[[], object]) -> None:
    try:
        download()
    except (OSError, RuntimeError) as error:
        # torchvision raises either: no network, no mirror, a wrong checksum.
        raise DataError(
            f"{name} could not be downloaded: {error}. Type: --data-root DIR with a copy of it."
        ) from error
