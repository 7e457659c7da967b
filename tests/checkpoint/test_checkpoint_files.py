"""The files of a checkpoint: who writes what, and that whatever was done to them is noticed before anything is touched."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lives import alone
from planted import FILES, NEW, OLD, Payload, resealed
from safetensors import safe_open
from stored import is_equal, newest, state, write

from ddp_kit.checkpoint.format import reader
from ddp_kit.checkpoint.format.layout import (
    MANIFEST,
    STATE,
    DamagedError,
    FormatError,
    fingerprint,
    parse_manifest,
)
from ddp_kit.checkpoint.format.reader import open_checkpoint
from ddp_kit.checkpoint.format.storage import LocalDisk, Memory
from ddp_kit.distributed.process_group import Group


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("place", ["memory", "disk"])
def test_what_any_number_of_ranks_wrote_comes_back_bit_for_bit(
    world_size: int, place: str, tmp_path: Path
) -> None:
    storage = Memory() if place == "memory" else LocalDisk(tmp_path)
    write(storage, 4, world_size=world_size)
    opened = open_checkpoint(storage, 4, group=alone())
    assert is_equal(opened, state(4))
    assert not is_equal(opened, state(5))
    assert storage.list(NEW) == sorted(
        [MANIFEST, STATE, *(f"rank-{rank}.safetensors" for rank in range(world_size))]
    )
    assert storage.list("") == [NEW]  # nothing temporary


@pytest.mark.ranks(3)
def test_three_ranks_read_what_one_two_or_four_wrote_and_all_hear_of_damage_that_one_saw(
    group: Group, tmp_path: Path
) -> None:
    """Each rank hashes a part of the files only."""
    from ddp_kit.distributed.collectives import from_rank

    for step, writers in ((2, 4), (4, 1), (6, 2)):
        if group.rank == 0:
            write(LocalDisk(tmp_path), step, world_size=writers)
        from_rank(group, b"written")
        assert is_equal(open_checkpoint(LocalDisk(tmp_path), step, group=group), state(step))
    for file in sorted((tmp_path / OLD).iterdir()):
        content = file.read_bytes()
        if group.rank == 0:
            file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        from_rank(group, b"broken")
        with pytest.raises(DamagedError, match=r"CRC-32|own SHA-256"):
            open_checkpoint(LocalDisk(tmp_path), 2, group=group)
        if group.rank == 0:
            file.write_bytes(content)
        from_rank(group, b"mended")


def test_a_shard_loads_with_safetensors_alone(tmp_path: Path) -> None:
    write(LocalDisk(tmp_path), 4, world_size=2)
    rows: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for rank in range(2):
        with safe_open(tmp_path / NEW / f"rank-{rank}.safetensors", framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118  it is no dict
                rows.setdefault(name, []).append(
                    (int(shard.metadata()[name]), shard.get_tensor(name))
                )
    for name, tensor in state(4).items():
        parts = [part for _, part in sorted(rows.get(name, []), key=lambda pair: pair[0])]
        if len(parts) > 1:
            whole = torch.cat(parts)
        elif parts:
            whole = parts[0]
        else:
            whole = torch.empty(tensor.shape)
        assert torch.equal(whole, tensor), name


# Breaking files


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def elsewhere(file: Path) -> Path:
    """Moves a file out of the run's directory and links to it."""
    target = file.parents[2] / f"elsewhere-{file.name}"
    file.rename(target)
    file.symlink_to(target)
    return target


BREAK: dict[str, Callable[[Path], object]] = {
    "empty": lambda file: file.write_bytes(b""),
    "one byte short": lambda file: os.truncate(file, file.stat().st_size - 1),
    "half": lambda file: os.truncate(file, file.stat().st_size // 2),
    "one byte long": lambda file: file.write_bytes(file.read_bytes() + b" "),
    "first bit": lambda file: flip(file, 0),
    "middle bit": lambda file: flip(file, file.stat().st_size // 2),
    "last bit": lambda file: flip(file, -1),
    "missing": lambda file: file.unlink(),
    "of another step": lambda file: shutil.copy(file.parents[1] / OLD / file.name, file),
    "of another run": lambda file: shutil.copy(file.parents[2] / "other" / NEW / file.name, file),
    "pickle": lambda file: file.write_bytes(pickle.dumps(Payload(file.parents[2] / "ran"))),
    "folder": lambda file: (file.unlink(), file.mkdir()),
    "pipe": lambda file: (file.unlink(), os.mkfifo(file)),
    "endless": lambda file: (file.unlink(), file.symlink_to("/dev/zero")),
    "link to nothing": lambda file: (file.unlink(), file.symlink_to("nothing")),
    "link to itself": lambda file: (file.unlink(), file.symlink_to(file)),
    "link to a changed file": lambda file: flip(elsewhere(file), -3),
}


@pytest.fixture(scope="session")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs with two checkpoints each, of other tensors."""
    root = tmp_path_factory.mktemp("runs")
    for step in (2, 4):
        write(LocalDisk(root / "run"), step, run_id="run")
        write(LocalDisk(root / "other"), step, run_id="other", tensors=state(100 + step))
    return root


@pytest.fixture
def broken(two_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of both, whose `run` a test breaks."""
    monkeypatch.setattr(reader, "PAUSE_S", 0.0)
    return Path(shutil.copytree(two_runs, tmp_path / "runs"))


def listing(root: Path) -> dict[str, bytes | str]:
    """Returns all names under a folder with their content."""
    return {
        str(path.relative_to(root)): path.read_bytes() if path.is_file() else ""
        for path in sorted(root.rglob("*"))
    }


@pytest.mark.parametrize("fault", BREAK)
@pytest.mark.parametrize("name", FILES)
def test_a_broken_file_sets_its_checkpoint_aside_and_the_older_one_is_used(
    broken: Path, name: str, fault: str
) -> None:
    BREAK[fault](broken / "run" / NEW / name)
    before = listing(broken) if fault not in ("pipe", "endless") else {}
    opened, notes = newest(LocalDisk(broken / "run"))
    if (
        name == MANIFEST and fault == "of another run"
    ):  # a whole manifest; the files are not those that it lists
        assert "CRC-32" in notes[0]
    assert opened is not None
    assert opened.folder == OLD
    assert is_equal(opened, state(2))
    assert sorted(path.name for path in (broken / "run").iterdir()) == [OLD, f"{NEW}.corrupt"]
    reason = (broken / "run" / f"{NEW}.corrupt" / "REASON").read_text()
    assert reason.strip() in notes[0]
    assert name in reason or name == MANIFEST, reason
    if before:  # set aside means renamed: nothing is changed, nothing is lost, nothing ran
        after = {
            path.replace(f"{NEW}.corrupt", NEW): content
            for path, content in listing(broken).items()
        }
        assert after == before | {f"run/{NEW}/REASON": reason.encode()}


def test_swapped_shards_and_a_manifest_of_another_step_are_noticed(broken: Path) -> None:
    folder = broken / "run" / NEW
    (folder / "rank-0.safetensors").rename(folder / "kept")
    (folder / "rank-1.safetensors").rename(folder / "rank-0.safetensors")
    (folder / "kept").rename(folder / "rank-1.safetensors")
    assert newest(LocalDisk(broken / "run"))[0].folder == OLD  # type: ignore[union-attr]  # None would be the failure
    shutil.copytree(broken / "run" / OLD, folder)
    opened, notes = newest(LocalDisk(broken / "run"))
    assert opened is not None
    assert opened.folder == OLD
    assert "step 2" in notes[0]
    assert (broken / "run" / f"{NEW}.corrupt-2").is_dir()


def test_no_bit_of_a_manifest_can_change_unnoticed() -> None:
    memory = Memory()
    write(memory, 4, metrics={"loss": 0.25})
    content = memory.files[f"{NEW}/{MANIFEST}"]
    assert parse_manifest(content, step=4).metrics == {"loss": 0.25}
    for at in range(len(content)):
        for bit in range(8):
            changed = bytearray(content)
            changed[at] ^= 1 << bit
            with pytest.raises(DamagedError):
                parse_manifest(bytes(changed), step=4)


def test_a_link_to_the_right_bytes_is_accepted_and_nothing_is_written_through_a_link(
    broken: Path,
) -> None:
    """People move checkpoints to other disks and leave links: the hash decides. A linked folder that is damaged gets no REASON."""
    folder = broken / "run" / NEW
    target = elsewhere(folder / "rank-1.safetensors")
    opened, _ = newest(LocalDisk(broken / "run"))
    assert opened is not None
    assert is_equal(opened, state(4))
    folder.rename(broken / "moved")
    folder.symlink_to(broken / "moved")
    flip(target, 9)
    outside = listing(broken / "moved")
    assert newest(LocalDisk(broken / "run"))[0].folder == OLD  # type: ignore[union-attr]  # None would be the failure
    assert listing(broken / "moved") == outside
    assert (broken / "run" / f"{NEW}.corrupt").is_symlink()


def test_all_checkpoints_damaged_is_none_found(broken: Path) -> None:
    for step in (OLD, NEW):
        (broken / "run" / step / STATE).unlink()
    assert newest(LocalDisk(broken / "run"))[0] is None
    assert newest(LocalDisk(broken / "run")) == (None, [])
    assert newest(LocalDisk(broken / "nowhere")) == (None, [])


def test_an_error_of_the_disk_is_no_damage(broken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Sick(Memory):
        def open(self, path: str) -> object:
            if path.endswith("rank-1.safetensors"):
                raise OSError(5, "Input/output error", path)
            return super().open(path)

    storage = Sick()
    write(Memory(), 4)
    healthy = Memory()
    write(healthy, 4)
    storage.files = dict(healthy.files)
    with pytest.raises(OSError, match="Input/output"):
        newest(storage)
    assert storage.files == healthy.files


def test_a_later_format_is_refused_with_both_versions_and_left_alone(broken: Path) -> None:
    file = broken / "run" / NEW / MANIFEST
    file.write_bytes(resealed(file.read_bytes(), format=7, new_field=1))
    before = listing(broken)
    with pytest.raises(
        FormatError,
        match=r"step-00000004: it has format version 7, this ddp_kit reads up to 1\. Install a later",
    ):
        newest(LocalDisk(broken / "run"))
    assert listing(broken) == before


@pytest.mark.parametrize(
    "name",
    [
        "../other/step-00000004/rank-0.safetensors",
        "/etc/passwd",
        "..",
        "",
        "rank-0.safetensors/../../x",
        "rank-0.safetensors\n",
        "x/rank-0.safetensors",
        "\ud800",
    ],
)
def test_names_that_leave_the_folder_are_refused_even_with_the_right_hash(
    broken: Path, name: str
) -> None:
    folder = broken / "run" / NEW
    secret = (broken / "other" / NEW / "rank-0.safetensors").read_bytes()
    files = json.loads((folder / MANIFEST).read_bytes())["files"]
    del files["rank-0.safetensors"]
    files[name] = fingerprint(memoryview(secret))
    (folder / MANIFEST).write_bytes(resealed((folder / MANIFEST).read_bytes(), files=files))
    opened, notes = newest(LocalDisk(broken / "run"))
    assert opened is not None
    assert opened.folder == OLD
    assert "which is no file of a checkpoint" in notes[0]
    assert (
        "is no file of a checkpoint" in (broken / "run" / f"{NEW}.corrupt" / "REASON").read_text()
    )
