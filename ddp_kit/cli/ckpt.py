"""`ddp-kit ckpt ls|verify|export|diff`: looking at checkpoints, and taking weights out.

The four commands need no ranks, no recipe and no model. None of them changes a checkpoint.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from ddp_kit.checkpoint.find import best_of, find, origin_of, path_of, weights_of
from ddp_kit.checkpoint.format.layout import (
    FOLDER,
    MANIFEST,
    DamagedError,
    FormatError,
    Manifest,
    folder_of,
)
from ddp_kit.checkpoint.format.opened import Opened
from ddp_kit.checkpoint.format.reader import read_headers, retried, verify_file
from ddp_kit.checkpoint.format.storage import LocalDisk
from ddp_kit.checkpoint.retention import read_manifest
from ddp_kit.distributed.failures import FailureReport
from ddp_kit.distributed.process_group import Group
from ddp_kit.distributed.topology import Topology
from ddp_kit.errors import ConfigError, DdpKitError, some
from ddp_kit.io.tables import aligned

MIB = 2**20
HEADER = ("step", "age", "size", "ranks", "complete", "")
NUMBERS = 4  # the first columns, whose texts stand at the right


def main(argv: Sequence[str]) -> int:
    """Runs one of the commands.

    Returns: 0, or 1 if `verify` found damage or `diff` a difference.
    Raises: ConfigError for a path that is no run and no checkpoint, or for flags that ask for what
        it does not have.
    """
    import tyro

    commands: dict[str, Callable[..., int]] = {
        "ls": ls,
        "verify": verify,
        "export": export,
        "diff": diff,
    }
    code: int = tyro.extras.subcommand_cli_from_dict(commands, args=argv, prog="ddp-kit ckpt")
    return code


def _alone() -> Group:
    """Returns this process, as the functions that ranks call together want it."""
    return Group(
        topology=Topology(),
        device=torch.device("cpu"),
        failure_report=FailureReport(rank=0, world_size=1),
    )


def ls(run: Path, /) -> int:
    """Lists a run's checkpoints: step, age, size, ranks that wrote it, whether it is complete, and
    the best one.

    Args:
        run: a run, or its folder of checkpoints
    """
    storage = origin_of(run, flag_text="ckpt ls").storage
    best = best_of(storage)
    rows: list[tuple[str, ...]] = [HEADER]
    for name in storage.list(""):
        stem, _, rest = name.partition(".")
        match = FOLDER.fullmatch(stem)
        if match and rest:
            rows.append(_incomplete(int(match[1]), rest))
        elif match:
            rows.append(_row(storage, int(match[1]), best))
    print("\n".join(aligned(rows, right=range(NUMBERS))))
    return 0


def _incomplete(step: int, note: str) -> tuple[str, ...]:
    return (str(step), "", "", "", "no", note)


def _row(storage: LocalDisk, step: int, best: Manifest | None) -> tuple[str, ...]:
    folder = folder_of(step)
    names = storage.list(folder)
    if MANIFEST not in names:
        return _incomplete(step, "no manifest")
    try:
        manifest = read_manifest(storage, step)
    except (DamagedError, FormatError) as error:
        return _incomplete(step, str(error))
    sizes = {name: (storage.root / folder / name).stat().st_size for name in names}
    wrong = [name for name, (size, *_) in manifest.files.items() if sizes.get(name) != size]
    complete = "yes"
    note = "  ".join(f"{name} {float(value):.4g}" for name, value in manifest.metrics.items())
    if best is not None and best.step == step:
        note = f"best  {note}"
    if wrong:
        complete = "no"
        note = f"{wrong[0]} is missing or has another size"
    size = f"{manifest.nbytes / MIB:.1f} MiB"
    ranks = str(manifest.world_size)
    return (str(step), age(time.time() - manifest.time), size, ranks, complete, note)


def age(seconds: float) -> str:
    """Returns a duration in its largest unit."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def verify(run: Path, /) -> int:
    """Compares every file of every checkpoint with its size and SHA-256. Exit code 1 and the
    file's name if one differs.

    Args:
        run: a run, its folder of checkpoints, or one checkpoint
    """
    origin = origin_of(run, flag_text="ckpt verify")
    steps = _steps_in(origin.storage)
    if origin.step is not None:
        steps = [origin.step]
    wrong = 0
    for step in steps:
        folder = folder_of(step)
        try:
            manifest = _verified(origin.storage, step)
        except (DdpKitError, OSError) as error:
            print(f"{folder}  DAMAGED  {error}")
            wrong += 1
            continue
        print(f"{folder}  good  {len(manifest.files)} files, {manifest.nbytes / MIB:.1f} MiB")
    if wrong:
        return 1
    return 0


def _steps_in(storage: LocalDisk) -> list[int]:
    matches = [FOLDER.fullmatch(name) for name in storage.list("")]
    return [int(match[1]) for match in matches if match]


def _verified(storage: LocalDisk, step: int) -> Manifest:
    """Reads all of a checkpoint. Raises: DdpKitError or OSError if a file is not as written."""
    folder = folder_of(step)
    manifest = retried(lambda: read_manifest(storage, step))
    for name, wanted in manifest.files.items():
        verify_file(storage, f"{folder}/{name}", wanted, thorough=True)
    read_headers(storage, folder, manifest)
    return manifest


def export(
    run: Path, /, *, out: Path, best: bool = False, step: int = -1, ema: bool = False
) -> int:
    """Writes a checkpoint's weights to one plain safetensors file that loads without ddp_kit.

    Args:
        run: a run, or one checkpoint
        out: the file to write
        best: the best checkpoint, with the weights that were evaluated (the average where it is on)
        step: the checkpoint of this step; without it the newest
        ema: the averaged weights
    """
    if out.exists():
        raise ConfigError(f"--out {out}: it is there already. Type another name.")
    opened = _opened(path_of(run, is_best=best, step=step, flag_text="ckpt export"))
    if ema and not any(name.startswith("ema/") for name in opened.kinds):
        raise ConfigError(
            f"--ema: {opened.folder} has no averaged weights, since the run was without --ema."
        )
    tensors = weights_of(opened, averaged=ema or best)
    wide = [name for name, tensor in tensors.items() if tensor.dtype == torch.complex128]
    if wide:
        raise ConfigError(
            f"ckpt export: {some(wide)} is complex128, for which a safetensors file has no dtype. "
            f"--init-from takes {run} itself."
        )
    for alias, name in opened.values.get("tied", {}).items():
        # A checkpoint of the trainable weights leaves frozen ones out.
        if name in tensors:
            tensors[alias] = tensors[name].clone()
    temporary = out.with_name(f"{out.name}.tmp")
    save_file(tensors, temporary, metadata={"format": "pt"})
    temporary.replace(out)
    print(f"{out}  {opened.folder}, {len(tensors)} tensors, {out.stat().st_size / MIB:.1f} MiB")
    return 0


def _opened(path: Path) -> Opened:
    opened = find(origin_of(path, flag_text="ckpt"), group=_alone())
    if opened is None:
        raise ConfigError(f"{path}: there is no good checkpoint in it.")
    return opened


def diff(a: Path, b: Path, /) -> int:
    """Says which tensors of two checkpoints differ, and by how much. Exit code 1 if any does.

    Args:
        a: a run (its newest checkpoint) or one checkpoint
        b: the other one
    """
    one = _opened(a)
    other = _opened(b)
    rows = []
    same = 0
    for name in sorted({*one.kinds, *other.kinds}):
        if name not in other.kinds:
            difference = f"only in {a}"
        elif name not in one.kinds:
            difference = f"only in {b}"
        else:
            difference = _difference(one, other, name)
        if difference:
            rows.append(f"{name}  {difference}")
        else:
            same += 1
    print("\n".join([*rows, f"{same} tensors are equal bit for bit, {len(rows)} differ"]))
    if rows:
        return 1
    return 0


def _difference(one: Opened, other: Opened, name: str) -> str:
    """Returns in words how a tensor that both have differs; "" if it is equal bit for bit."""
    if one.kinds[name] != other.kinds[name]:
        shape, dtype = one.kinds[name]
        other_shape, other_dtype = other.kinds[name]
        return f"{shape} {dtype} and {other_shape} {other_dtype}"
    left = one.tensor(name)
    right = other.tensor(name)
    if torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8)):
        return ""
    wide = torch.complex128 if left.is_complex() else torch.float64
    gap = (left.to(wide) - right.to(wide)).abs()
    relative = float(gap.norm() / right.to(wide).norm())
    differing = float((gap != 0).double().mean())
    return (
        f"max |a-b| {float(gap.max()):.3g}  ||a-b||/||b|| {relative:.3g}  "
        f"{differing:.1%} of its elements"
    )
