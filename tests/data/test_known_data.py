"""The known data sets and the decoded-image cache, against the readers they stand in for."""

import pickle
import struct
from pathlib import Path

import numpy as np
import pytest

from ddp_kit.data import known
from ddp_kit.data.cache import decoded_folder
from ddp_kit.data.images import ImageArray
from ddp_kit.data.known import CIFAR10_CLASSES, cifar10, digits, mnist
from ddp_kit.errors import ConfigError, DataError

Image = pytest.importorskip("PIL.Image")


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def write_mnist(raw: Path, *, train: int, test: int) -> None:
    random = np.random.default_rng(3)
    raw.mkdir(parents=True)
    for prefix, count in (("train", train), ("t10k", test)):
        images = random.integers(0, 256, (count, 6, 5), dtype=np.uint8)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(
            struct.pack(">4I", 0x803, *images.shape) + images.tobytes()
        )
        labels = random.integers(0, 10, count, dtype=np.uint8)
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(
            struct.pack(">2I", 0x801, count) + labels.tobytes()
        )


def write_images(
    folder: Path, *, classes: tuple[str, ...] = ("cat", "dog"), each: int = 3, size: int = 8
) -> None:
    random = np.random.default_rng(5)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for number in range(each):
            Image.fromarray(random.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(
                folder / name / f"{number:04}.jpg", quality=95
            )


def raw_images(data: ImageArray) -> np.ndarray:
    """The data set's uint8 images, normalisation taken back."""
    batch, _ = data.__getitems__(range(len(data)))
    return np.rint((batch.permute(0, 2, 3, 1).numpy() * data.std + data.mean) * 255).astype(
        np.uint8
    )


def test_digits_are_scikit_learns_and_the_parts_are_disjoint_and_whole():
    load_digits = pytest.importorskip("sklearn.datasets").load_digits
    reference = load_digits()
    parts = [digits("train"), digits("validation")]
    assert [len(part) for part in parts] == [1437, 360]
    assert (parts[0].images[..., 0] == reference.images * 15).all()
    assert (parts[0].labels == reference.target).all()
    rows = np.concatenate([raw_images(part).reshape(len(part), -1) for part in parts])
    assert sorted(map(bytes, rows)) == sorted(map(bytes, parts[0].images.reshape(1797, -1)))
    batch, _ = parts[0].__getitems__(range(1437))
    assert abs(batch.mean()) < 0.02
    assert abs(batch.std() - 1) < 0.02


def test_mnist_reads_what_torchvision_reads_and_maps_it(tmp_path):
    datasets = pytest.importorskip("torchvision.datasets")
    write_mnist(tmp_path / "MNIST" / "raw", train=30, test=20)
    data = mnist(tmp_path, "test")
    reference = datasets.MNIST(str(tmp_path), train=False)
    assert (raw_images(data)[..., 0] == reference.data.numpy()).all()
    assert (data.labels == reference.targets.numpy()).all()
    assert isinstance(data.images, np.memmap)


def test_validation_images_are_held_out_of_training_and_are_always_the_same_ones(tmp_path):
    write_mnist(tmp_path / "MNIST" / "raw", train=5200, test=1)
    train, validation, again = (
        mnist(tmp_path, split) for split in ("train", "validation", "validation")
    )
    assert (len(train), len(validation)) == (200, 5000)
    found = [*map(bytes, raw_images(train)), *map(bytes, raw_images(validation))]
    assert sorted(found) == sorted(bytes(image) for image in train.images)
    assert (raw_images(validation) == raw_images(again)).all()


def test_image_folders_are_decoded_as_torchvisions_image_folder_and_once(tmp_path, monkeypatch):
    datasets = pytest.importorskip("torchvision.datasets")
    write_images(tmp_path / "train", classes=("dog", "cat", "ape"))
    found = decoded_folder(tmp_path / "train")
    reference = datasets.ImageFolder(str(tmp_path / "train"))
    assert found.classes == tuple(reference.classes)
    assert found.labels.tolist() == reference.targets
    assert all(
        (image == np.asarray(expected)).all()
        for image, (expected, _) in zip(found.images, reference, strict=True)
    )
    assert isinstance(found.images, np.memmap)
    assert not found.images.flags.writeable
    monkeypatch.setattr(
        "ddp_kit.data.cache._decode", lambda name, size: pytest.fail("decoded again")
    )
    assert (decoded_folder(tmp_path / "train").images == found.images).all()


def test_a_changed_folder_is_decoded_anew(tmp_path):
    folder = tmp_path / "train"
    write_images(folder)
    before = decoded_folder(folder).images.copy()
    Image.new("RGB", (8, 8), "red").save(folder / "cat" / "0001.jpg")
    changed = decoded_folder(folder).images
    is_same = [bool((old == new).all()) for old, new in zip(before, changed, strict=True)]
    assert is_same == [True, False, True, True, True, True]
    (folder / "cat" / "0002.jpg").unlink()
    assert len(decoded_folder(folder).images) == 5


def test_images_of_several_sizes_are_refused_unless_a_size_is_given(tmp_path):
    write_images(tmp_path / "train", classes=("cat",))
    write_images(tmp_path / "train", classes=("dog",), size=100)
    with pytest.raises(DataError, match=r"0000\.jpg is 100 x 100 pixels.*8 x 8.*size="):
        decoded_folder(tmp_path / "train")
    assert names(tmp_path) == ["train"]
    assert decoded_folder(tmp_path / "train", size=(12, 10)).images.shape == (6, 12, 10, 3)


def test_a_file_that_is_no_image_is_named_and_no_cache_stays(tmp_path):
    write_images(tmp_path / "train")
    (tmp_path / "train" / "cat" / "0001.jpg").write_bytes(b"not a picture")
    with pytest.raises(DataError, match=r"0001\.jpg cannot be decoded"):
        decoded_folder(tmp_path / "train")
    assert names(tmp_path) == ["train"]


def test_cifar10_reads_image_folders_and_holds_out_validation(tmp_path, monkeypatch):
    monkeypatch.setattr(known, "VALIDATION", 4)
    for part in ("train", "test"):
        write_images(tmp_path / "cifar10" / part, classes=CIFAR10_CLASSES, each=2)
    parts = [cifar10(tmp_path, split) for split in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [16, 4, 20]
    assert parts[0].classes == CIFAR10_CLASSES
    labels = parts[2].__getitems__(range(20))[1]
    assert labels.tolist() == np.repeat(np.arange(10), 2).tolist()


def test_cifar10_reads_torchvisions_own_layout(tmp_path, monkeypatch):
    reader = pytest.importorskip("torchvision.datasets").CIFAR10
    write_cifar10_batches(tmp_path / "cifar-10-batches-py", reader)
    trust_any_checksum(monkeypatch, reader)
    data = cifar10(tmp_path, "test")
    reference = reader(str(tmp_path), train=False)
    assert (raw_images(data) == reference.data).all()
    assert data.labels.tolist() == reference.targets
    assert isinstance(data.images, np.memmap)


def test_a_damaged_cifar10_is_said_to_be_damaged(tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(DataError, match="is damaged"):
        cifar10(tmp_path, "test")


def write_cifar10_batches(folder: Path, reader: type) -> None:
    folder.mkdir(parents=True)
    random = np.random.default_rng(11)
    for name, _ in reader.train_list + reader.test_list:
        batch = {
            "data": random.integers(0, 256, (3, 3072), dtype=np.uint8),
            "labels": [int(label) for label in random.integers(0, 10, 3)],
        }
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / reader.meta["filename"]).write_bytes(
        pickle.dumps({reader.meta["key"]: list(CIFAR10_CLASSES)})
    )


def trust_any_checksum(monkeypatch: pytest.MonkeyPatch, reader: type) -> None:
    monkeypatch.setattr(
        reader, "_check_integrity", lambda self: (Path(self.root) / self.base_folder).is_dir()
    )
    monkeypatch.setitem(reader.meta, "md5", None)


def test_a_download_puts_mnist_where_it_is_looked_for_and_is_not_repeated(tmp_path, monkeypatch):
    module = pytest.importorskip("torchvision.datasets.mnist")
    write_mnist(tmp_path / "mirror", train=30, test=20)
    fetched = []

    def fetch(url: str, download_root: str, filename: str, md5: str) -> None:
        fetched.append(filename)
        name = filename.removesuffix(".gz")
        (Path(download_root) / name).write_bytes((tmp_path / "mirror" / name).read_bytes())

    monkeypatch.setattr(module, "download_and_extract_archive", fetch)
    for _ in range(2):
        assert len(mnist(tmp_path / "data", "test", download=True)) == 20
    assert len(fetched) == 4
    assert names(tmp_path / "data") == ["MNIST"]


def test_a_download_puts_cifar10_where_it_is_looked_for(tmp_path, monkeypatch):
    module = pytest.importorskip("torchvision.datasets.cifar")

    def fetch(url: str, root: str, filename: str, md5: str) -> None:
        write_cifar10_batches(Path(root) / "cifar-10-batches-py", module.CIFAR10)
        (Path(root) / filename).touch()

    monkeypatch.setattr(module, "download_and_extract_archive", fetch)
    trust_any_checksum(monkeypatch, module.CIFAR10)
    assert len(cifar10(tmp_path / "data", "test", download=True)) == 3
    assert names(tmp_path / "data") == ["cifar-10-batches-py", "cifar-10-batches-py.decoded-test"]


def test_a_failed_download_says_so_and_leaves_nothing(tmp_path, monkeypatch):
    module = pytest.importorskip("torchvision.datasets.mnist")

    def fetch(*args: object, **options: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(module, "download_and_extract_archive", fetch)
    with pytest.raises(DataError, match=r"could not be downloaded: .*--data-root DIR"):
        mnist(tmp_path / "data", "train", download=True)
    assert names(tmp_path / "data") == []


@pytest.mark.parametrize(
    ("read", "name"), [(mnist, "t10k-images-idx3-ubyte"), (cifar10, "cifar-10-batches-py")]
)
def test_missing_data_is_an_error_that_says_where_it_looked_and_what_to_type(tmp_path, read, name):
    with pytest.raises(DataError) as caught:
        read(tmp_path / "nowhere", "test")
    message = str(caught.value)
    assert str(tmp_path / "nowhere") in message
    assert name in message
    assert "--data-root DIR" in message
    assert "--download" in message


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: b"\0\0\x08\x01" + content[4:],
        lambda content: b"",
    ],
)
def test_a_damaged_idx_file_is_named(tmp_path, damage):
    raw = tmp_path / "MNIST" / "raw"
    write_mnist(raw, train=3, test=3)
    file = raw / "t10k-images-idx3-ubyte"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(DataError, match="t10k-images-idx3-ubyte"):
        mnist(tmp_path, "test")


@pytest.mark.parametrize(
    "read",
    [
        lambda root: digits("test"),
        lambda root: mnist(root, "dev"),
        lambda root: cifar10(root, "dev"),
    ],
)
def test_an_unknown_split_is_refused(tmp_path, read):
    with pytest.raises(ConfigError, match='expected "train"'):
        read(tmp_path)
