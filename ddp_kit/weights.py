"""A model's weights as values: their hash, equality over ranks, reading and writing plain safetensors files.

Owns: `weights_sha256`, `init_from`, and the file of weights that a run leaves.
Refuses: optimizer state, and pickle: loading runs no code.
"""

import hashlib
import os
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ddp_kit.collectives import first_difference
from ddp_kit.errors import ConfigError, DdpKitError, nearest
from ddp_kit.groups import Group


def named_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns parameters and floating-point buffers in name order, a tied tensor under its first name."""
    buffers = {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}
    named = {name: parameter.detach() for name, parameter in model.named_parameters()} | buffers
    return dict(sorted(named.items()))


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def weights_sha256(model: nn.Module) -> str:
    """Returns the SHA-256 over name, dtype, shape and bytes of each of `named_weights`: the figure by which two runs are compared."""
    digest = hashlib.sha256()
    for name, tensor in named_weights(model).items():
        digest.update(f"{name} {str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}\n".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def require_equal(model: nn.Module, *, group: Group) -> None:
    """Raises: DdpKitError on every rank if the ranks do not hold the same weights, naming the first that differs."""
    if group.control is None:
        return
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    if first_difference(group, [zlib.crc32("\n".join(f"{name} {tuple(named[name].shape)}" for name in named).encode())]) is not None:
        raise DdpKitError(
            "the ranks built different models: names or shapes of the parameters differ. The model must not depend on the rank."
        )
    at = first_difference(group, [zlib.crc32(_bytes(tensor)) for tensor in named.values()])
    if at is not None:
        raise DdpKitError(
            f"the ranks start from different values of {list(named)[at]}. Draw initial weights from torch's default generator, "
            "which is seeded alike on all ranks, or load the same file on all of them."
        )


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Reads a .safetensors file, or a folder of them that together hold the tensors.

    Raises: ConfigError if there is none, or a file is damaged.
    """
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise ConfigError(
            f"--init-from {path}: expected a .safetensors file or a folder of them; {'none is in it' if path.is_dir() else 'no such file'}."
        )
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as content:
                tensors |= {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118  it is no dict
        except SafetensorError as error:
            raise ConfigError(f"--init-from {file}: not a whole safetensors file: {error}.") from error
    return tensors


def load_weights(model: nn.Module, path: Path) -> None:
    """Copies the tensors of `path` into the model by name; nothing is changed unless all fit.

    Raises: ConfigError with a table of missing, unexpected and differently shaped tensors.
    """
    tensors = read_weights(path)
    expected = model.state_dict()
    twins = _tied_names(model)
    rows = []
    for name, own in expected.items():
        given = next((tensors[twin] for twin in twins.get(name, (name,)) if twin in tensors), None)
        if given is None and not name.endswith("num_batches_tracked"):
            near = nearest(name, set(tensors) - set(expected))
            rows.append(f"  missing     {name} {tuple(own.shape)}{f'   (the file has {near})' if near else ''}")
        elif given is not None and given.shape != own.shape:
            rows.append(f"  shape       {name}: the model has {tuple(own.shape)}, the file {tuple(given.shape)}")
    rows += [f"  unexpected  {name} {tuple(tensors[name].shape)}" for name in tensors if name not in expected]
    if rows:
        more = f"\n  ... and {len(rows) - 20} more" if len(rows) > 20 else ""
        raise ConfigError(f"--init-from {path} does not fit this model; nothing was loaded.\n" + "\n".join(rows[:20]) + more)
    with torch.no_grad():
        for name, own in expected.items():
            given = next((tensors[twin] for twin in twins.get(name, (name,)) if twin in tensors), None)
            if given is not None:
                own.copy_(given)


def _tied_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Returns, for each name of a tied tensor, all its names."""
    by_identity: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_identity.setdefault(id(parameter), []).append(name)
    return {name: tuple(names) for names in by_identity.values() for name in names if len(names) > 1}


def save_weights(model: nn.Module, path: Path) -> None:
    """Writes parameters and buffers to one safetensors file, whole or not at all; a tied tensor once. One rank calls it."""
    kept: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    persistent = model.state_dict(keep_vars=True)
    for name, tensor in persistent.items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            kept[name] = tensor.detach().cpu().contiguous().clone()
    temporary = path.with_name(path.name + ".tmp")
    save_file(kept, temporary)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
