"""A model's weights as values: their hash, whether all ranks hold the same, and which are tied."""

import hashlib
import zlib
from collections.abc import Mapping

import torch
from torch import nn

from ddp_kit.distributed.collectives import first_difference, same_everywhere
from ddp_kit.distributed.local_shard import whole
from ddp_kit.distributed.process_group import Group
from ddp_kit.distributed.tensors_from_rank import as_bytes, view_of
from ddp_kit.errors import DdpKitError
from ddp_kit.training.ema import is_weight


def named_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns parameters and floating-point or complex buffers in name order, a tied tensor under
    its first name.
    """
    buffers = {name: buffer for name, buffer in model.named_buffers() if is_weight(buffer)}
    named = dict(model.named_parameters()) | buffers
    return dict(sorted(named.items()))


def bytes_of(tensor: torch.Tensor) -> bytes:
    """Returns the content of a tensor."""
    content = as_bytes(tensor.cpu())
    return bytes(view_of(content))


def weights_sha256(model: nn.Module) -> str:
    """Returns the SHA-256 over name, dtype, shape and bytes of each of `named_weights`: the figure
    by which two runs are compared.

    Where ranks hold parts of the model, every rank calls it; they are put together tensor by
    tensor.
    """
    return sha256_of(named_weights(model))


def sha256_of(tensors: Mapping[str, torch.Tensor]) -> str:
    """Returns the SHA-256 over name, dtype, shape and bytes of each tensor, in the order given."""
    digest = hashlib.sha256()
    for name, part in tensors.items():
        tensor = whole(part)
        dtype = str(tensor.dtype).removeprefix("torch.")
        digest.update(f"{name} {dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(bytes_of(tensor))
    return digest.hexdigest()


def base_sha256(model: nn.Module) -> str:
    """Returns the hash of the frozen parameters, which a checkpoint of the trainable ones alone
    needs beside it.
    """
    frozen = {}
    for name, parameter in sorted(model.named_parameters()):
        if not parameter.requires_grad:
            frozen[name] = parameter.detach()
    return sha256_of(frozen)


def require_equal(model: nn.Module, *, group: Group) -> None:
    """Compares the ranks' models. Every rank calls it.

    Raises: DdpKitError on every rank if they do not hold the same weights, naming the first that
        differs.
    """
    if group.control_pg is None:
        return
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    shapes = [f"{name} {tuple(tensor.shape)}" for name, tensor in named.items()]
    if not same_everywhere(group, shapes):
        raise DdpKitError(
            "the ranks built different models: names or shapes of the parameters differ. "
            "The model must not depend on the rank."
        )
    at = first_difference(group, [zlib.crc32(bytes_of(tensor)) for tensor in named.values()])
    if at is not None:
        raise DdpKitError(
            f"the ranks start from different values of {list(named)[at]}. Draw initial weights "
            "from torch's default generator, which is seeded alike on all ranks, or load the same "
            "file on all of them."
        )


def tied_names(model: nn.Module) -> dict[str, str]:
    """Returns the further names of tied tensors, each with the first one."""
    first: dict[int, str] = {}
    tied = {}
    everything = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    for name, tensor in everything:
        first_name = first.setdefault(id(tensor), name)
        if first_name != name:
            tied[name] = first_name
    return tied


def tie(model: nn.Module, tied: Mapping[str, str]) -> None:
    """Gives tensors their further names again, which moving a model from or to the meta device
    takes from them.
    """
    first = dict(model.named_parameters()) | dict(model.named_buffers())
    for alias, name in tied.items():
        owner, _, attribute = alias.rpartition(".")
        setattr(model.get_submodule(owner), attribute, first[name])
