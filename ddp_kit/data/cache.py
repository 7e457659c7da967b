"""Decoded images, kept once as a uint8 array beside the data.

An image folder is listed, decoded in one process of a node, and the result is mapped read-only in
all of them, so that the ranks of a node share one copy in the page cache. Labels and splits are not
in the cache: they come from the listing, read anew each time. The cache of an older listing is
never deleted.
"""

import hashlib
import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ddp_kit.data.first_on_node import cache_path, first_on_node
from ddp_kit.errors import DataError, require, some

# torchvision's `IMG_EXTENSIONS`.
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
# Images decoded before they are written: bounds the memory.
GROUP = 1024
# Pixels up to which the calling thread decodes faster than several.
TINY = 64 * 64


@dataclass(frozen=True)
class DecodedFolder:
    """A folder of images by class.

    `images` uint8 (N, H, W, 3), mapped read-only; `labels` int64 (N,); `classes` their names.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]


def decoded_folder(folder: Path, *, size: tuple[int, int] | None = None) -> DecodedFolder:
    """Decodes `folder`/<class>/.../<image> once a node. Any rank may call it.

    Images, labels and classes are those of torchvision's `ImageFolder`, in its order: each folder
    in `folder` is a class, hidden ones too, with the images in it and in folders below it.

    Args: `size` (height, width) to which each image is resized; without it they must all be of one.
    Raises: DataError if there are no class folders, one of them holds no image, or as `decoded`
        does.
    """
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    # Not Path objects, which triple the time that a large listing takes at every start.
    paths: list[str] = []
    labels: list[int] = []
    empty: list[str] = []
    for label, name in enumerate(classes):
        found = _images_below(os.fspath(folder / name))
        if not found:
            empty.append(name)
        paths += found
        labels += [label] * len(found)
    if not paths:
        raise DataError(
            f"{folder} holds no images; expected are folders, one a class, "
            f"of files {', '.join(SUFFIXES)}."
        )
    if empty:
        raise DataError(
            f"{folder}: no image is in {some(empty)}. Every folder is a class and takes a place "
            "among the labels: remove what is none, or put images into it "
            f"({', '.join(SUFFIXES)})."
        )
    images = decoded(paths, beside=folder, size=size)
    return DecodedFolder(images, np.asarray(labels, np.int64), tuple(classes))


def _images_below(folder: str) -> list[str]:
    """Returns the images in a folder and below it, in the order of torchvision's `make_dataset`."""
    found = []
    for root, _, names in sorted(os.walk(folder, followlinks=True)):
        images = [name for name in sorted(names) if name.lower().endswith(SUFFIXES)]
        found += [f"{root}/{name}" for name in images]
    return found


def decoded(
    paths: Sequence[str | Path], *, beside: Path, size: tuple[int, int] | None = None
) -> NDArray[np.uint8]:
    """Decodes image files, once a node, into `<beside>.decoded-<key>.npy` and maps that.

    See `cache_path` for the folder. The key hashes each file's name, bytes, modification time and
    change time (of its content, name or mode, which nobody can set), and `size`: a changed set is
    decoded anew, a copy of it too. Any rank may call it; the first does the work, the others wait
    on a file lock.

    Returns: uint8 (N, H, W, 3) in the order of `paths`, memory-mapped read-only.
    Raises: DataError if a file is no image, or without `size` (height, width) of another size than
        the first one.
    """
    names = [os.fspath(path) for path in paths]
    cache = cache_path(beside, f"{beside.name}.decoded-{_key(names, beside=beside, size=size)}.npy")
    first_on_node(cache, lambda temporary: _decode_into(temporary, names, size=size))
    images: NDArray[np.uint8] = np.load(cache, mmap_mode="r", allow_pickle=False)
    return images


def _key(names: Sequence[str], *, beside: Path, size: tuple[int, int] | None) -> str:
    # Left out of the key: the folder may be moved together with its cache.
    prefix = str(beside)
    described = [repr(size)]
    for name in names:
        status = os.stat(name)  # noqa: PTH116 (a third of the time of Path(name).stat())
        own = (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        described.append(f"{name.removeprefix(prefix)}\0{own}")
    # Names are bytes to the system, which need not be text.
    text = "\n".join(described).encode(errors="surrogateescape")
    return hashlib.sha256(text).hexdigest()[:16]


def _decode_into(file: Path, names: Sequence[str], *, size: tuple[int, int] | None) -> None:
    require("PIL.Image", extra="recipes")
    began = time.monotonic()
    height, width = size or _decode(names[0], size=None).shape[:2]
    shape = (len(names), height, width, 3)
    decode = partial(_decode, size=size)
    # Written as a stream, not through a map: a full disk is then an error, where a store into a
    # mapped page is a SIGBUS.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool, file.open("wb") as out:
        # Decoding lets go of the interpreter's lock, so threads help; for tiny images handing the
        # lock over costs more than that.
        in_order = pool.map if height * width > TINY else map
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(out, header)
        for start in range(0, len(names), GROUP):
            group = names[start : start + GROUP]
            for name, image in zip(group, in_order(decode, group), strict=True):
                if image.shape != shape[1:]:
                    raise DataError(
                        f"{name} is {image.shape[0]} x {image.shape[1]} pixels (height x width), "
                        f"the first image {height} x {width}; expected is one size. "
                        "Give size=(height, width) to resize them all."
                    )
                out.write(image.tobytes())
    seconds = time.monotonic() - began
    mebibytes = np.prod(shape) / 2**20
    logging.getLogger("ddp_kit").info(
        "decoded %d images (%.0f MiB) in %.1f s", len(names), mebibytes, seconds
    )


def _decode(name: str, *, size: tuple[int, int] | None) -> NDArray[np.uint8]:
    from PIL import Image

    try:
        with Image.open(name) as image:
            pixels = image.convert("RGB")
    except OSError as error:
        # PIL's word for "no image", a truncated file and a missing one alike.
        raise DataError(
            f"{name} cannot be decoded: {error}. Mend it or take it out of the folder."
        ) from error
    if size is not None and pixels.size != (size[1], size[0]):
        pixels = pixels.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return np.asarray(pixels)
