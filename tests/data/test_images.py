"""ImageArray against torchvision: the same crops, flips and numbers, a batch at a time."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ddp_kit.data.images import ImageArray, mirror, padded_crop
from ddp_kit.data.seeding import Draws
from ddp_kit.errors import DataError

MEAN = (0.5, 0.4, 0.3)
STD = (0.2, 0.25, 0.3)


def some_images(count: int = 40, *, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(7).integers(0, 256, (count, 12, 10, channels), dtype=np.uint8)


def array(images: np.ndarray, **options: object) -> ImageArray:
    return ImageArray(images, np.arange(len(images)) % 10, mean=MEAN, std=STD, **options)


def test_without_draws_a_batch_is_torchvisions_to_dtype_and_normalize():
    v2 = pytest.importorskip("torchvision.transforms.v2")
    images = some_images()
    batch, labels = array(images, crop_padding=4, flip=True).__getitems__([3, 0, 39])
    reference = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
    expected = reference(torch.from_numpy(images[[3, 0, 39]]).permute(0, 3, 1, 2))
    torch.testing.assert_close(batch, expected, atol=1e-6, rtol=1e-6)
    assert batch.shape == (3, 3, 12, 10)
    assert labels.tolist() == [3, 0, 9]


def test_crops_and_flips_are_torchvisions_at_the_same_offsets():
    functional = pytest.importorskip("torchvision.transforms.v2.functional")
    images = some_images()
    padding = 3
    indices = list(range(40))
    batch, _ = array(images, crop_padding=padding, flip=True).__getitems__(
        indices, Draws(5, 2, indices)
    )
    numbers = Draws(5, 2, indices).uniform(3)
    for row, image in enumerate(torch.from_numpy(images).permute(0, 3, 1, 2)):
        top, left = (int(number * (2 * padding + 1)) for number in numbers[row, :2])
        expected = functional.crop(functional.pad(image, [padding]), top, left, 12, 10)
        if numbers[row, 2] < 0.5:
            expected = functional.horizontal_flip(expected)
        expected = functional.normalize(expected.float() / 255, MEAN, STD)
        torch.testing.assert_close(batch[row], expected, atol=1e-6, rtol=1e-6)


def test_every_offset_of_a_crop_is_drawn_and_half_of_the_images_are_flipped():
    numbers = Draws(0, 0, range(20_000)).uniform(3)
    offsets = (numbers[:, :2] * 9).astype(int)
    assert set(offsets[:, 0]) == set(offsets[:, 1]) == set(range(9))
    assert abs((numbers[:, 2] < 0.5).mean() - 0.5) < 0.02


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_crop_and_mirror_are_slices_of_the_padded_image(channels):
    images = some_images(9, channels=channels)
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    top = np.array([0, 4, 2, 1, 3, 0, 4, 2, 2])
    left = np.array([4, 0, 2, 3, 1, 0, 4, 1, 2])
    cropped = padded_crop(images, padding=2, top=top, left=left)
    for row in range(9):
        expected = padded[row, top[row] : top[row] + 12, left[row] : left[row] + 10]
        assert (cropped[row] == expected).all()
    mirrored = cropped.copy()
    mirror(mirrored, rows=np.array([1, 8]))
    assert (mirrored[[1, 8]] == cropped[[1, 8], :, ::-1]).all()
    assert (np.delete(mirrored, [1, 8], axis=0) == np.delete(cropped, [1, 8], axis=0)).all()


def test_a_sample_is_the_same_bits_in_every_batch():
    data = array(some_images(), crop_padding=4, flip=True)
    whole, _ = data.__getitems__(np.arange(40), Draws(1, 0, np.arange(40)))
    for size in (1, 7, 13):
        parts = [np.arange(40)[start : start + size] for start in range(0, 40, size)]
        split = torch.cat([data.__getitems__(part, Draws(1, 0, part))[0] for part in parts])
        assert torch.equal(whole, split)


def test_a_batch_is_not_overwritten_by_the_next_one():
    data = array(some_images(), crop_padding=4, flip=True)
    first, _ = data.__getitems__([1, 2], Draws(0, 0, [1, 2]))
    kept = first.clone()
    data.__getitems__([3, 4], Draws(0, 0, [3, 4]))
    assert torch.equal(first, kept)


def test_a_subset_of_a_subset_reads_the_same_images_and_copies_none():
    images = some_images()
    data = array(images)
    part = data.subset(range(10, 40)).subset([0, 29, 5])
    assert len(part) == 3
    assert part.images is images
    assert torch.equal(part.__getitems__([0, 1, 2])[0], data.__getitems__([10, 39, 15])[0])
    assert part.__getitems__([0, 1, 2])[1].tolist() == [0, 9, 5]


@pytest.mark.skipif(
    not Path("/proc/self/smaps").exists(), reason="the kernel's account of shared pages is Linux's"
)
def test_a_mapped_set_that_was_read_as_a_whole_holds_no_page_of_its_own(tmp_path):
    file = tmp_path / "images.npy"
    np.save(file, np.zeros((512, 32, 32, 3), np.uint8))
    mapped = np.load(file, mmap_mode="r")
    data = ImageArray(
        mapped, np.zeros(512, np.int64), mean=MEAN, std=STD, crop_padding=4, flip=True
    )
    indices = np.arange(512)
    data.subset(indices).__getitems__(indices, Draws(0, 0, indices))
    before, _, after = Path("/proc/self/smaps").read_text().partition(str(file))
    kilobytes = {
        line.split(":")[0]: int(line.split()[1])
        for line in after.splitlines()[1:20]
        if line.endswith(" kB")
    }
    assert before.splitlines()[-1].split()[1] == "r--s"  # read-only and shared
    assert kilobytes["Rss"] >= 512 * 3
    assert kilobytes["Anonymous"] == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"images": some_images().astype(np.float32)}, "float32"),
        ({"images": some_images()[..., 0]}, r"\(40, 12, 10\)"),
        ({"labels": np.zeros(39, np.int64)}, "one an image"),
        ({"std": (0.1, 0.0, 0.1)}, "positive deviations"),
        ({"mean": (0.5,)}, "3 means"),
        ({"crop_padding": -1}, "padding"),
        ({"classes": ("cat", "dog")}, "Sample 2 has label 2; expected are 0 to 1"),
        ({"labels": np.full(40, -1)}, "label -1"),
    ],
)
def test_what_does_not_fit_is_refused(change, said):
    given = {
        "images": some_images(),
        "labels": np.arange(40) % 10,
        "mean": MEAN,
        "std": STD,
    } | change
    with pytest.raises(DataError, match=said):
        ImageArray(given.pop("images"), given.pop("labels"), **given)


def test_pixels_of_a_subset_are_those_of_its_rows() -> None:
    images = np.random.default_rng(0).integers(256, size=(10, 4, 4, 3)).astype(np.uint8)
    data = array(images)
    pixels, labels = data.subset([7, 2]).pixels()
    assert (pixels == images[[7, 2]]).all()
    assert labels.tolist() == data.labels[[7, 2]].tolist()
    assert data.pixels()[0] is images
