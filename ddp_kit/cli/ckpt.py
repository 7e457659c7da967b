"""`ddp-kit ckpt ls|verify|export|diff`: looking at checkpoints, checking them, and taking weights out.

Owns: these four commands. They need no ranks, no recipe and no model. Refuses: changing a checkpoint, and overwriting a file.
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
from ddp_kit.checkpoint.format.reader import describe, retried, verify_file
from ddp_kit.checkpoint.format.storage import LocalDisk
from ddp_kit.checkpoint.retention import read_manifest
from ddp_kit.distributed.failures import Blame
from ddp_kit.distributed.process_group import Group
from ddp_kit.distributed.topology import Topology
from ddp_kit.errors import ConfigError, DdpKitError, some


def main(argv: Sequence[str]) -> int:
    """Runs one of the commands. Returns: 0, or 1 if `verify` found damage or `diff` a difference."""
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
    """This process, as the functions that ranks call together want it."""
    return Group(topology=Topology(), device=torch.device("cpu"), blame=Blame(rank=0, world_size=1))


def ls(run: Path, /) -> int:
    """Lists a run's checkpoints: step, age, size, ranks that wrote it, whether it is complete, and the best one.

    Args:
        run: a run, or its folder of checkpoints
    """
    storage = origin_of(run, flag_text="ckpt ls").storage
    best = best_of(storage)
    rows: list[tuple[str, ...]] = [("step", "age", "size", "ranks", "complete", "")]
    for name in storage.list(""):
        stem, _, rest = name.partition(".")
        if match := FOLDER.fullmatch(stem):
            rows.append(
                (str(int(match[1])), "", "", "", "no", rest)
                if rest
                else _row(storage, int(match[1]), best)
            )
    widths = [max(len(row[i]) for row in rows) for i in range(6)]
    for row in rows:
        cells = [
            text.rjust(width) if i < 4 else text.ljust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
    return 0


def _row(storage: LocalDisk, step: int, best: Manifest | None) -> tuple[str, ...]:
    folder = folder_of(step)
    if MANIFEST not in storage.list(folder):
        return str(step), "", "", "", "no", "no manifest"
    try:
        manifest = read_manifest(storage, step)
    except (DamagedError, FormatError) as error:
        return str(step), "", "", "", "no", str(error)
    sizes = {file: (storage.root / folder / file).stat().st_size for file in storage.list(folder)}
    wrong = [file for file, (size, *_) in manifest.files.items() if sizes.get(file) != size]
    note = "  ".join(f"{name} {float(value):.4g}" for name, value in manifest.metrics.items())
    if best is not None and best.step == step:
        note = f"best  {note}"
    facts = (
        age(time.time() - manifest.time),
        f"{manifest.nbytes / 2**20:.1f} MiB",
        str(manifest.world_size),
    )
    return (
        str(step),
        *facts,
        "no" if wrong else "yes",
        f"{wrong[0]} is missing or has another size" if wrong else note,
    )


def age(seconds: float) -> str:
    """Returns a duration in its largest unit."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def verify(run: Path, /) -> int:
    """Compares every file of every checkpoint with its size and SHA-256. Exit code 1 and the file's name if one differs.

    Args:
        run: a run, its folder of checkpoints, or one checkpoint
    """
    origin = origin_of(run, flag_text="ckpt verify")
    storage = origin.storage
    found = [int(match[1]) for name in storage.list("") if (match := FOLDER.fullmatch(name))]
    wrong = 0
    for step in found if origin.step is None else [origin.step]:
        folder = folder_of(step)
        try:
            manifest = retried(lambda step=step: read_manifest(storage, step))  # type: ignore[misc]  # mypy: lambda's default
            for name, wanted in manifest.files.items():
                verify_file(storage, f"{folder}/{name}", wanted, thorough=True)
            describe(storage, folder, manifest)
            print(f"{folder}  good  {len(manifest.files)} files, {manifest.nbytes / 2**20:.1f} MiB")
        except (DdpKitError, OSError) as error:
            print(f"{folder}  DAMAGED  {error}")
            wrong += 1
    return 1 if wrong else 0


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
    if wide := [name for name, tensor in tensors.items() if tensor.dtype == torch.complex128]:
        raise ConfigError(
            f"ckpt export: {some(wide)} is complex128, for which a safetensors file has no dtype. --init-from takes {run} itself."
        )
    for alias, name in opened.values.get("tied", {}).items():
        if name in tensors:  # a checkpoint of the trainable weights leaves frozen ones out
            tensors[alias] = tensors[name].clone()
    temporary = out.with_name(f"{out.name}.tmp")
    save_file(tensors, temporary, metadata={"format": "pt"})
    temporary.replace(out)
    print(f"{out}  {opened.folder}, {len(tensors)} tensors, {out.stat().st_size / 2**20:.1f} MiB")
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
    one, other = _opened(a), _opened(b)
    rows, same = [], 0
    for name in sorted({*one.kinds, *other.kinds}):
        if name not in one.kinds or name not in other.kinds:
            rows.append(f"{name}  only in {a if name in one.kinds else b}")
        elif one.kinds[name] != other.kinds[name]:
            (shape, dtype), (other_shape, other_dtype) = one.kinds[name], other.kinds[name]
            rows.append(f"{name}  {shape} {dtype} and {other_shape} {other_dtype}")
        elif words := _gap(one.tensor(name), other.tensor(name)):
            rows.append(f"{name}  {words}")
        else:
            same += 1
    print("\n".join([*rows, f"{same} tensors are equal bit for bit, {len(rows)} differ"]))
    return 1 if rows else 0


def _gap(left: torch.Tensor, right: torch.Tensor) -> str:
    """Returns how far two tensors are apart, in words; "" if they are equal bit for bit."""
    if torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8)):
        return ""
    wide = torch.complex128 if left.is_complex() else torch.float64
    gap = (left.to(wide) - right.to(wide)).abs()
    relative = float(gap.norm() / right.to(wide).norm())
    return f"max |a-b| {float(gap.max()):.3g}  ||a-b||/||b|| {relative:.3g}  {float((gap != 0).double().mean()):.1%} of its elements"
