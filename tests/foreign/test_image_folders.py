"""Image folders as people keep them: nested, of any suffix, with files swapped, replaced and left over. torchvision's `ImageFolder` is the reference."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddp_kit.data.cache import DecodedFolder, decoded_folder
from ddp_kit.errors import DataError

datasets = pytest.importorskip("torchvision.datasets")
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


def write(path: Path, *, value: int, when_ns: int = 0) -> None:
    """Writes an image of one grey value; files of all values have one size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lossless = {"lossless": True} if path.suffix == ".webp" else {}
    Image.fromarray(np.full((4, 6), value, np.uint8)).save(path, **lossless)
    if when_ns:
        os.utime(path, ns=(when_ns, when_ns))


def of_torchvision(folder: Path) -> tuple[list[list[int]], list[int], list[str]]:
    """Returns the images as ImageFolder reads them, its labels and its classes."""
    reference = datasets.ImageFolder(str(folder))
    images = [np.asarray(image).flatten().tolist() for image, _ in reference]
    return images, list(reference.targets), list(reference.classes)


def read(found: DecodedFolder) -> tuple[list[list[int]], list[int], list[str]]:
    images = [image.flatten().tolist() for image in found.images]
    return images, found.labels.tolist(), list(found.classes)


def test_every_suffix_and_nested_folders_are_read_in_image_folders_order(tmp_path: Path) -> None:
    folder = tmp_path / "train"
    for number, suffix in enumerate(SUFFIXES):
        write(folder / "cat" / f"{number}{suffix}", value=number)
    write(folder / "cat" / "b" / "deep" / "x.PNG", value=40)
    write(folder / "cat" / "b.png", value=41)
    write(folder / "cat" / "b-side" / "x.tif", value=42)
    write(folder / "dog" / "only" / "below" / "1.ppm", value=50)
    write(folder / ".hidden" / "0.png", value=60)
    write(folder / "beside.png", value=70)
    (folder / "cat" / "notes.txt").write_text("no image")
    write(tmp_path / "elsewhere" / "far.png", value=80)
    (folder / "dog" / "link").symlink_to(tmp_path / "elsewhere")
    assert read(decoded_folder(folder)) == of_torchvision(folder)


@pytest.mark.parametrize("name", [".ipynb_checkpoints", "empty", "zebra"])
def test_a_class_without_images_is_refused_by_name_as_image_folder_does(
    name: str, tmp_path: Path
) -> None:
    folder = tmp_path / "train"
    write(folder / "cat" / "0.png", value=1)
    write(folder / "dog" / "0.png", value=2)
    (folder / name / "inner").mkdir(parents=True)
    (folder / name / "notes.txt").write_text("no image")
    with pytest.raises(FileNotFoundError, match=name):
        datasets.ImageFolder(str(folder))
    with pytest.raises(DataError, match=rf"{name}.*labels.*[Rr]emove"):
        decoded_folder(folder)
    shutil.rmtree(folder / name)
    assert read(decoded_folder(folder)) == of_torchvision(folder)


def test_a_folder_without_classes_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "train" / "0.png", value=1)
    with pytest.raises(DataError, match="holds no images; expected are folders, one a class"):
        decoded_folder(tmp_path / "train")


SECOND_NS = 10**18


@pytest.mark.parametrize("times", ["one", "two"])
def test_files_that_swap_names_are_decoded_anew(times: str, tmp_path: Path) -> None:
    folder = tmp_path / "train"
    for number in range(4):
        own_ns = SECOND_NS + (number * 10**9 if times == "two" else 0)
        write(folder / "cat" / f"{number}.bmp", value=number, when_ns=own_ns)
    decoded_folder(folder)
    cat = folder / "cat"
    (cat / "0.bmp").rename(cat / "aside")
    (cat / "1.bmp").rename(cat / "0.bmp")
    (cat / "aside").rename(cat / "1.bmp")
    assert read(decoded_folder(folder)) == of_torchvision(folder)


@pytest.mark.parametrize("when_ns", [SECOND_NS, SECOND_NS - 10**9], ids=["as old", "older"])
def test_a_file_that_is_replaced_by_an_older_one_is_decoded_anew(
    when_ns: int, tmp_path: Path
) -> None:
    folder = tmp_path / "train"
    write(folder / "cat" / "0.bmp", value=0, when_ns=SECOND_NS)
    write(folder / "cat" / "1.bmp", value=1, when_ns=SECOND_NS + 10**9)
    decoded_folder(folder)
    # As `cp -p`, rsync and tar leave a file: with the time of what it was copied from.
    write(tmp_path / "new.bmp", value=9, when_ns=when_ns)
    shutil.copy2(tmp_path / "new.bmp", folder / "cat" / "0.bmp")
    assert read(decoded_folder(folder)) == of_torchvision(folder)


def test_what_was_written_over_in_place_with_its_old_time_is_decoded_anew(tmp_path: Path) -> None:
    file = tmp_path / "train" / "cat" / "0.bmp"
    write(file, value=0, when_ns=SECOND_NS)
    decoded_folder(tmp_path / "train")
    write(file, value=9, when_ns=SECOND_NS)
    assert read(decoded_folder(tmp_path / "train")) == of_torchvision(tmp_path / "train")


def test_what_did_not_change_is_decoded_once_and_moves_with_its_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a" / "train" / "cat" / "0.png", value=3)
    expected = read(decoded_folder(tmp_path / "a" / "train"))
    (tmp_path / "a").rename(tmp_path / "b")
    monkeypatch.setattr(
        "ddp_kit.data.cache._decode", lambda name, size: pytest.fail("decoded again")
    )
    assert read(decoded_folder(tmp_path / "b" / "train")) == expected
