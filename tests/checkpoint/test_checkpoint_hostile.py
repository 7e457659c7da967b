"""Checkpoints that somebody wrote on purpose: they run no code, take no memory, write nowhere, and are refused in words."""

import ast
import json
import math
import os
import pickle
import random
import sys
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from lives import alone
from mutated import mutated_bytes, mutated_json
from paths import ROOT
from planted import FILES, NEW, Payload, resealed
from stored import is_equal, newest, state, write

from ddp_kit.checkpoint.format import reader
from ddp_kit.checkpoint.format.layout import (
    MANIFEST,
    STATE,
    DamagedError,
    Fingerprint,
    FormatError,
    Manifest,
    fingerprint,
    parse_manifest,
    seal,
)
from ddp_kit.checkpoint.format.reader import open_checkpoint, read_headers
from ddp_kit.checkpoint.format.storage import LocalDisk, Memory
from ddp_kit.checkpoint.retention import best

WITHIN = 64 << 20  # bytes that reading a hostile file of a few KB may take at most


def sealed(files: dict[str, bytes], folder: str = NEW) -> None:
    """Gives every file of a checkpoint in memory its right size and hash in the manifest: what was changed, was changed on purpose."""
    path = f"{folder}/{MANIFEST}"
    listed = {
        name: content
        for name, content in ((name.partition("/")[2], content) for name, content in files.items())
        if name != MANIFEST
    }
    files[path] = resealed(
        files[path],
        files={name: fingerprint(memoryview(content)) for name, content in listed.items()},
    )


def made(**facts: Any) -> Memory:
    storage = Memory()
    write(storage, 4, metrics={"loss": 0.5, "auc": "nan"}, best_by="min loss", **facts)
    return storage


def opened_or_refused(storage: Memory) -> bool:
    """Returns whether a checkpoint was opened; its tensors can then be read. Any error but the two is a failure of the test."""
    try:
        opened = open_checkpoint(storage, 4, group=alone())
        for name in opened.kinds:
            opened.tensor(name)
    except (DamagedError, FormatError) as error:
        str(error).encode()  # can be written into REASON
        return False
    return True


@pytest.mark.parametrize("seed", range(4))
def test_mutated_manifests_are_refused_or_read_but_nothing_else(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4,000, with a right seal, as somebody would write them on purpose."""
    monkeypatch.setattr(reader, "PAUSE_S", 0.0)
    storage, draw, accepted = made(), random.Random(seed), 0
    content = storage.files[f"{NEW}/{MANIFEST}"]
    begin = time.monotonic()
    for i in range(1000):
        if i % 2:
            changed = seal(mutated_bytes(content.rpartition(b',\n "sha256"')[0] + b"\n}", draw))
        else:
            changed = seal(json.dumps(mutated_json(json.loads(content), draw), indent=1).encode())
        with suppress(DamagedError, FormatError):
            manifest = parse_manifest(changed, step=4)
            best([manifest], metric="loss", mode="min")
            assert manifest.nbytes >= 0
            accepted += 1
        storage.files[f"{NEW}/{MANIFEST}"] = changed
        opened_or_refused(storage)
    assert accepted > 10  # else the mutations would be too coarse to find anything
    assert time.monotonic() - begin < 30


@pytest.mark.parametrize("seed", range(6))
def test_mutated_headers_and_states_are_refused_or_read_but_nothing_else(seed: int) -> None:
    """6,000, all with right hashes."""
    draw, whole = random.Random(100 + seed), made(world_size=3)
    begin = time.monotonic()
    for i in range(1000):
        storage = Memory()
        storage.files = dict(whole.files)
        name = f"{NEW}/{draw.choice(['rank-0.safetensors', 'rank-1.safetensors', 'rank-2.safetensors', STATE])}"
        content = storage.files[name]
        if name.endswith(STATE):
            text = (
                mutated_bytes(content, draw)
                if i % 2
                else json.dumps(mutated_json(json.loads(content), draw)).encode()
            )
        else:
            length = int.from_bytes(content[:8], "little")
            head = content[8 : 8 + length].rstrip()
            head = (
                mutated_bytes(head, draw)
                if i % 2
                else json.dumps(mutated_json(json.loads(head), draw)).encode()
            )
            size = draw.choice([length, len(head), len(head), draw.getrandbits(64)])
            text = (
                size.to_bytes(8, "little")
                + head.ljust(length if size == length else 0)
                + content[8 + length :]
            )
        storage.files[name] = text
        sealed(storage.files)
        opened_or_refused(storage)
    assert time.monotonic() - begin < 30


@contextmanager
def bounded_memory() -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < WITHIN
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("claim", [10 << 30, 2**64 - 1, 2**63, 65 << 20])
def test_a_header_that_claims_10_gb_takes_no_memory(claim: int) -> None:
    storage = made()
    name = f"{NEW}/rank-0.safetensors"
    storage.files[name] = claim.to_bytes(8, "little") + storage.files[name][8:]
    sealed(storage.files)
    with bounded_memory(), pytest.raises(DamagedError, match=f"header claims {claim} bytes"):
        open_checkpoint(storage, 4, group=alone())


def test_a_large_file_without_content_takes_no_memory(tmp_path: Path) -> None:
    """A sparse file costs its writer nothing."""
    storage, size = LocalDisk(tmp_path), 300 << 20
    write(storage, 4)
    for name, step in ((STATE, 4), ("rank-0.safetensors", 4)):
        os.truncate(tmp_path / NEW / name, size)
        manifest = parse_manifest((tmp_path / NEW / MANIFEST).read_bytes(), step=step)
        files = {**manifest.files, name: Fingerprint(size, "0" * 64, 0)}
        with bounded_memory(), pytest.raises(DamagedError):  # its hash is not looked at here
            read_headers(storage, NEW, Manifest(**{**vars(manifest), "files": files}))
        os.truncate(tmp_path / NEW / name, 100)
    os.truncate(tmp_path / NEW / MANIFEST, size)
    with bounded_memory(), pytest.raises(DamagedError, match=r"manifest\.json has 314572800 bytes"):
        open_checkpoint(storage, 4, group=alone())


@pytest.mark.parametrize(
    "text",
    [b"[" * 100_000, b'{"a":' * 100_000, b"9" * 100_000, b"\xff\xfe", b"\x00", b"null", b"[1]"],
)
def test_json_that_exhausts_a_parser_is_damage(text: bytes) -> None:
    for name in (STATE, "rank-1.safetensors"):
        storage = made()
        storage.files[f"{NEW}/{name}"] = (
            text if name == STATE else len(text).to_bytes(8, "little") + text
        )
        sealed(storage.files)
        with pytest.raises(DamagedError):
            open_checkpoint(storage, 4, group=alone())


@pytest.mark.parametrize(
    "shape", [[-1, 0], [0, -1], [True], [2.0], ["1"], [math.inf], [10**400], None, [2**62, 2**62]]
)
def test_a_shape_that_no_tensor_has_is_damage(shape: Any) -> None:
    storage = made()
    content = json.loads(storage.files[f"{NEW}/{STATE}"])
    content["tensors"]["model/new"] = [shape, "F32"]
    storage.files[f"{NEW}/{STATE}"] = json.dumps(content).encode()
    sealed(storage.files)
    with pytest.raises(DamagedError):
        open_checkpoint(storage, 4, group=alone())


# What happens while a checkpoint is read

happened: list[tuple[str, str]] | None = None
CODE = (
    "pickle.find_class",
    "exec",
    "compile",
    "import",
    "os.system",
    "subprocess.Popen",
    "os.posix_spawn",
    "os.exec",
    "os.fork",
    "ctypes.dlopen",
    "code.__new__",
    "marshal.loads",
)
CHANGES = (
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
    "shutil.rmtree",
    "socket.connect",
)


def _heard(event: str, args: tuple[Any, ...]) -> None:
    if happened is not None and (event in CODE or event in CHANGES or event == "open"):
        happened.append((event, repr(args)))
        if (
            event == "open"
            and isinstance(args[2], int)
            and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        ):
            happened.append(("write", str(args[0])))


@pytest.fixture(scope="session", autouse=True)
def _listening() -> None:
    sys.addaudithook(_heard)


@contextmanager
def listened() -> Iterator[list[tuple[str, str]]]:
    global happened
    happened = []
    try:
        yield happened
    finally:
        happened = None


def test_the_audit_hears_a_pickle(tmp_path: Path) -> None:
    content = pickle.dumps(Payload(tmp_path / "ran"))
    with listened() as events:
        pickle.loads(content)
    assert {"pickle.find_class", "os.mkdir"} <= {event for event, _ in events}


@pytest.mark.parametrize("name", [None, *FILES])
def test_reading_runs_no_code_and_writes_nothing_outside_the_run(
    name: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`name` holds a pickle, with the right hash where the manifest can give it one."""
    monkeypatch.setattr(reader, "PAUSE_S", 0.0)
    run = tmp_path / "run"
    for step in (2, 4):
        write(LocalDisk(run), step)
    newest(LocalDisk(run))  # what is imported on first use is not the file's doing
    payload = pickle.dumps(Payload(tmp_path / "ran"))
    if name is not None:
        (run / NEW / name).write_bytes(payload)
        if name != MANIFEST:
            files = {f"{NEW}/{file.name}": file.read_bytes() for file in (run / NEW).iterdir()}
            sealed(files)
            (run / NEW / MANIFEST).write_bytes(files[f"{NEW}/{MANIFEST}"])
    with listened() as events:
        opened, _ = newest(LocalDisk(run))
        assert opened is not None
        assert is_equal(opened, state(opened.manifest.step))
    assert opened.manifest.step == (4 if name is None else 2)
    assert not [event for event in events if event[0] in CODE]
    assert all(str(run) in args for event, args in events if event in CHANGES or event == "write")
    assert not (tmp_path / "ran").exists()


def test_nothing_that_reads_checkpoints_can_unpickle() -> None:
    """Every module that `restore` and `find` import, by any way: no torch.load, and none of the modules that make objects from bytes."""
    seen: set[str] = set()
    todo = [
        "ddp_kit.checkpoint.format.reader",
        "ddp_kit.checkpoint.find",
        "ddp_kit.checkpoint.state_dict",
        "ddp_kit.cli.ckpt",
        "ddp_kit.checkpoint.init_from",
    ]
    while todo:
        module = todo.pop()
        path = ROOT / Path(*module.split(".")).with_suffix(".py")
        path = path if path.exists() else ROOT / Path(*module.split(".")) / "__init__.py"
        if module in seen or not path.exists():
            continue
        seen.add(module)
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [
                    node.module or "",
                    *(f"{node.module}.{alias.name}" for alias in node.names),
                ]
            assert not {
                "pickle",
                "marshal",
                "shelve",
                "dill",
                "cloudpickle",
                "joblib",
                "torch.load",
            } & set(names), (module, names)
            assert not (
                isinstance(node, ast.Attribute)
                and ast.unparse(node) in ("torch.load", "np.load", "numpy.load")
            ), module
            todo += [name for name in names if name.startswith("ddp_kit")]
    assert len(seen) > 20
