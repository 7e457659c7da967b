"""Images that lie in memory, or in a mapped file, and are handed out as whole batches.

Reading sample by sample costs Python some 60 us a sample; here a batch costs a few NumPy calls.
Images stay uint8 until the last step, because moving a quarter of the bytes through the memory is
what the speed comes from. There is no random state here: every draw is keyed by the caller.
"""

import copy
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddp_kit.data.seeding import Draws
from ddp_kit.errors import DataError

Indices = Sequence[int] | NDArray[np.int64]


class ImageArray:
    """uint8 images (N, H, W, C) with int64 labels (N,), augmented and normalised by the batch.

    A batch is float32 (B, C, H, W), channels last in memory, and int64 (B,). `images` may be a
    read-only `np.memmap`: nothing of it is copied but the batches, so the ranks of a node share its
    pages.

    mean, std      per channel, of pixels scaled to 0..1, as torchvision's `Normalize` takes them
    crop_padding   in training, so many black pixels on each side, then a crop of the old size at a
                   random place
    flip           in training, half of the images mirrored left to right
    classes        names of the labels; if given, labels must be less than their number

    Raises: DataError if shapes, types or labels do not fit.
    """

    def __init__(
        self,
        images: NDArray[np.uint8],
        labels: NDArray[np.int64],
        *,
        mean: Sequence[float],
        std: Sequence[float],
        crop_padding: int = 0,
        flip: bool = False,
        classes: Sequence[str] = (),
    ):
        self.images = images
        self.labels = np.asarray(labels, np.int64)
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.crop_padding = crop_padding
        self.flip = flip
        self.classes = tuple(classes)
        # A subset's rows; None is all.
        self._rows: NDArray[np.int64] | None = None
        self._check_shapes()
        self._check_labels()
        # A scale and a shift for every value of an image: three numbers, one a channel, would not
        # fill a vector register.
        pixels = images.shape[1] * images.shape[2]
        scale = np.tile(1 / (255 * np.asarray(self.std)), pixels)
        shift = np.tile(-np.asarray(self.mean) / np.asarray(self.std), pixels)
        self._scale = torch.from_numpy(scale).float()
        self._shift = torch.from_numpy(shift).float()

    def _check_shapes(self) -> None:
        shape = self.images.shape
        if self.images.dtype != np.uint8 or self.images.ndim != 4:
            raise DataError(
                f"ImageArray got images {self.images.dtype} {shape}; "
                "expected is uint8 (N, H, W, C)."
            )
        if self.labels.shape != shape[:1]:
            raise DataError(
                f"ImageArray got labels {self.labels.shape} for images {shape}; "
                "expected is one an image."
            )
        is_by_channel = len(self.mean) == len(self.std) == shape[3]
        if not is_by_channel or min(self.std) <= 0 or self.crop_padding < 0:
            raise DataError(
                f"ImageArray got mean {self.mean}, std {self.std}, "
                f"crop_padding {self.crop_padding} for images {shape}; "
                f"expected are {shape[3]} means, as many positive deviations, a padding >= 0."
            )

    def _check_labels(self) -> None:
        labels = self.labels
        end = len(self.classes) or int(labels.max(initial=0)) + 1
        wrong = np.flatnonzero((labels < 0) | (labels >= end))
        if len(wrong):
            at = wrong[0]
            raise DataError(
                f"Sample {at} has label {labels[at]}; "
                f"expected are 0 to {end - 1} for {end} classes."
            )

    def __len__(self) -> int:
        return len(self.images) if self._rows is None else len(self._rows)

    def subset(self, indices: Indices) -> "ImageArray":
        """Returns the samples `indices` as a data set that shares this one's images."""
        rows = np.asarray(indices, np.int64)
        part = copy.copy(self)
        part._rows = rows if self._rows is None else self._rows[rows]
        return part

    def pixels(self) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Returns images and labels for a data set of one's own; a subset's are copied.

        Returns: the images, uint8 (N, H, W, C), and the labels, int64 (N,).
        """
        if self._rows is None:
            return self.images, self.labels
        return self.images[self._rows], self.labels[self._rows]

    def __getitems__(self, indices: Indices, draws: Draws | None = None) -> tuple[Tensor, Tensor]:
        """Returns the batch of the samples `indices` in fresh memory.

        Without `draws`, as in evaluation, nothing is random.
        """
        rows = np.asarray(indices, np.int64)
        if self._rows is not None:
            rows = self._rows[rows]
        pixels = self.images[rows]
        if draws is not None and (self.crop_padding or self.flip):
            # Row, column, flip: always all three, so that they do not hang on each other.
            numbers = draws.uniform(3)
            if self.crop_padding:
                offsets = (numbers[:, :2] * (2 * self.crop_padding + 1)).astype(np.int64)
                pixels = padded_crop(
                    pixels, padding=self.crop_padding, top=offsets[:, 0], left=offsets[:, 1]
                )
            if self.flip:
                mirror(pixels, rows=np.flatnonzero(numbers[:, 2] < 0.5))
        return self._normalised(pixels), torch.from_numpy(self.labels[rows])

    def _normalised(self, pixels: NDArray[np.uint8]) -> Tensor:
        values = torch.from_numpy(pixels.reshape(len(pixels), -1)).to(torch.float32)
        # Not fused: that rounds differently where a vector ends.
        values.mul_(self._scale).add_(self._shift)
        return values.view(pixels.shape).permute(0, 3, 1, 2)


def padded_crop(
    pixels: NDArray[np.uint8], *, padding: int, top: NDArray[np.int64], left: NDArray[np.int64]
) -> NDArray[np.uint8]:
    """Pads images (B, H, W, C) with zeros and cuts (H, W) at (top, left), one pair an image.

    Args: `top`, `left` (B,), each in 0 .. 2 padding.
    Returns: a new uint8 array (B, H, W, C).
    """
    count, height, width, channels = pixels.shape
    canvas = np.zeros((count, height + 2 * padding, width + 2 * padding, channels), np.uint8)
    canvas[:, padding : padding + height, padding : padding + width] = pixels
    # Each run of `width` pixels of the canvas as one opaque item: indexing then copies a row at a
    # time, not a byte.
    runs = np.ndarray(
        (count, height + 2 * padding, 2 * padding + 1),
        np.dtype((np.void, width * channels)),
        buffer=canvas,
        strides=(canvas.strides[0], canvas.strides[1], canvas.strides[2]),
    )
    cut = runs[np.arange(count)[:, None], top[:, None] + np.arange(height), left[:, None]]
    cropped: NDArray[np.uint8] = cut.view(np.uint8).reshape(pixels.shape)
    return cropped


def mirror(pixels: NDArray[np.uint8], *, rows: NDArray[np.int64]) -> None:
    """Mirrors the images `rows` of (B, H, W, C) left to right, in place."""
    if len(rows):
        # torch.flip has a vectorised kernel for exactly this layout; NumPy's reversed copy goes
        # pixel by pixel.
        chosen = torch.from_numpy(pixels[rows]).permute(0, 3, 1, 2)
        pixels[rows] = chosen.flip(3).permute(0, 2, 3, 1).numpy()
