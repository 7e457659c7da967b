"""A model's weights as values: their hash, equality over ranks, reading them from runs and plain safetensors files.

Owns: `weights_sha256`, and `init_from`.
Refuses: optimizer state, and pickle: loading runs no code.
"""

import hashlib
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ddp_kit.checkpoint.find import find, is_checkpoint, origin_of, weights_of
from ddp_kit.checkpoint.format.reader import misfits, require_fit, table
from ddp_kit.distributed.collectives import first_difference
from ddp_kit.distributed.local_shard import Held, held, whole
from ddp_kit.distributed.process_group import Group
from ddp_kit.errors import ConfigError, DdpKitError, nearest, some
from ddp_kit.io.logs import logger
from ddp_kit.training.ema import is_weight

PICKLES = (".pth", ".pt", ".bin", ".ckpt")
CONVERT = """ It looks like a pickle, and loading one may run code. Convert a file that you trust, once:
  python -c "import sys, torch; from safetensors.torch import save_file; \
    save_file({n: t.clone() for n, t in torch.load(sys.argv[1], weights_only=True).items()}, sys.argv[2])" %s %s"""


def named_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns parameters and floating-point or complex buffers in name order, a tied tensor under its first name."""
    buffers = {name: buffer for name, buffer in model.named_buffers() if is_weight(buffer)}
    named = dict(model.named_parameters()) | buffers
    return dict(sorted(named.items()))


def _bytes(tensor: torch.Tensor) -> bytes:
    return (
        tensor.detach()
        .cpu()
        .resolve_conj()
        .contiguous()
        .reshape(-1)
        .view(torch.uint8)
        .numpy()
        .tobytes()
    )


def weights_sha256(model: nn.Module) -> str:
    """Returns the SHA-256 over name, dtype, shape and bytes of each of `named_weights`: the figure by which two runs are compared.

    Where ranks hold parts of the model, every rank calls it; they are put together tensor by tensor.
    """
    return sha256_of(named_weights(model))


def sha256_of(tensors: Mapping[str, torch.Tensor]) -> str:
    """Returns the SHA-256 over name, dtype, shape and bytes of each tensor, in the order given."""
    digest = hashlib.sha256()
    for name, part in tensors.items():
        tensor = whole(part)
        digest.update(
            f"{name} {str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}\n".encode()
        )
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def base_sha256(model: nn.Module) -> str:
    """Returns the hash of the frozen parameters, which a checkpoint of the trainable ones alone needs beside it."""
    return sha256_of(
        {
            name: tensor.detach()
            for name, tensor in sorted(model.named_parameters())
            if not tensor.requires_grad
        }
    )


def require_equal(model: nn.Module, *, group: Group) -> None:
    """Raises: DdpKitError on every rank if the ranks do not hold the same weights, naming the first that differs."""
    if group.control is None:
        return
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    if (
        first_difference(
            group,
            [
                zlib.crc32(
                    "\n".join(f"{name} {tuple(named[name].shape)}" for name in named).encode()
                )
            ],
        )
        is not None
    ):
        raise DdpKitError(
            "the ranks built different models: names or shapes of the parameters differ. The model must not depend on the rank."
        )
    at = first_difference(group, [zlib.crc32(_bytes(tensor)) for tensor in named.values()])
    if at is not None:
        raise DdpKitError(
            f"the ranks start from different values of {list(named)[at]}. Draw initial weights from torch's default generator, "
            "which is seeded alike on all ranks, or load the same file on all of them."
        )


def read_weights(path: Path, *, group: Group) -> tuple[dict[str, torch.Tensor], str]:
    """Reads the weights of a run, of a checkpoint, of a .safetensors file or of a folder of them. Every rank calls it.

    Returns: tensors by name, and the hash of the frozen weights that a checkpoint of the trainable ones belongs to, else "".
    Raises: ConfigError if there is none, or a file is damaged.
    """
    if is_checkpoint(path):
        opened = find(origin_of(path, flag_text="--init-from"), group=group)
        if opened is None:
            raise ConfigError(f"--init-from {path}: there is no good checkpoint in it.")
        return weights_of(opened), str(opened.values["base_sha256"])
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise ConfigError(
            f"--init-from {path}: expected a run, a checkpoint, a .safetensors file or a folder of them; "
            f"{'none is in it' if path.is_dir() else 'no such file'}."
        )
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as content:
                tensors |= {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118  it is no dict
        except SafetensorError as error:
            hint = (
                CONVERT % (file, file.with_suffix(".safetensors")) if file.suffix in PICKLES else ""
            )
            raise ConfigError(
                f"--init-from {file}: not a whole safetensors file: {error}.{hint}"
            ) from error
    return tensors, ""


def load_weights(
    model: nn.Module, path: Path, *, group: Group, rename: Sequence[str] = (), partial: bool = False
) -> None:
    """Copies the tensors of `path` into the model by name (`rename`: `old=new`); nothing is changed unless all fit.

    `partial` takes those that fit and logs a table of the others, none of which may be frozen.

    Raises: ConfigError with a table of missing, unexpected and differently shaped tensors; if `partial`, when none fits.
    """
    tensors, base = read_weights(path, group=group)
    for old, new in (pair.split("=") for pair in rename):
        if old not in tensors:
            near = nearest(old, tensors)
            raise ConfigError(
                f"--rename {old}={new}: {path} has no {old}.{f' Did you mean {near}?' if near else ''}"
            )
        tensors[new] = tensors.pop(old)
    live = dict(sorted([*model.named_parameters(), *model.named_buffers()]))
    saved = model.state_dict()
    for alias, name in tied_names(model).items():
        given = tensors.pop(alias, None)
        if name not in tensors and given is not None:
            tensors[name] = given
    free = {
        name
        for name in live
        if name not in tensors and (name not in saved or name.endswith("num_batches_tracked"))
    }
    if base and base == base_sha256(model):
        free |= {
            name for name, parameter in model.named_parameters() if not parameter.requires_grad
        }
    wanted = {
        name: (tuple(tensor.shape), tensor.dtype)
        for name, tensor in live.items()
        if name not in free
    }
    floats = {
        name
        for name in wanted
        if name in tensors and _differ_in_width_only(tensors[name], live[name])
    }
    found = {
        name: (tuple(tensor.shape), live[name].dtype if name in floats else tensor.dtype)
        for name, tensor in tensors.items()
    }
    unfit = misfits(found, wanted)
    fitting = [name for name in wanted if name not in unfit]
    frozen = [
        name
        for name, parameter in model.named_parameters()
        if name in unfit and not parameter.requires_grad
    ]
    if frozen or not (
        partial and fitting
    ):  # a frozen tensor that is not loaded would stay random for good
        hint = (
            "\nType --init-partial to take what fits and leave the rest at its initial values."
            if fitting and not partial
            else ""
        )
        hint = f"\nFrozen, and so needed from it: {some(frozen)}." if frozen else hint
        require_fit(found, wanted, where=f"--init-from {path}", hint=hint)
    elif unfit:
        logger.info(
            "--init-from %s: took %d of the model's %d tensors; not these:\n%s",
            path,
            len(fitting),
            len(wanted),
            table(unfit),
        )
    with torch.no_grad():
        for name in fitting:
            place = held(live[name])
            assert isinstance(place, Held)  # DeepSpeed has not split it yet
            place.rows.copy_(
                tensors[name][place.start : place.stop] if place.shape else tensors[name]
            )


def _differ_in_width_only(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether both are floating-point, or both complex."""
    if one.is_complex() or other.is_complex():
        return one.is_complex() and other.is_complex()
    return one.is_floating_point() and other.is_floating_point()


def tied_names(model: nn.Module) -> dict[str, str]:
    """Returns the further names of tied tensors, each with the first one."""
    first: dict[int, str] = {}
    everything = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    return {
        name: first[id(tensor)]
        for name, tensor in everything
        if first.setdefault(id(tensor), name) != name
    }


def tie(model: nn.Module, tied: Mapping[str, str]) -> None:
    """Gives tensors their further names again, which moving a model from or to the meta device takes from them."""
    first = dict(model.named_parameters()) | dict(model.named_buffers())
    for alias, name in tied.items():
        owner, _, attribute = alias.rpartition(".")
        setattr(model.get_submodule(owner), attribute, first[name])
