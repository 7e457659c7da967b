"""Whether all ranks still hold the same weights and buffers: compared at each save and evaluation.

Ranks stay equal because they do the same with equal numbers. Whatever breaks that (a callback on
one rank, a loss that writes into the model, a broken device) would end in a checkpoint of rank 0's
half of the truth.
"""

import json
import zlib
from collections import Counter

import torch

from ddp_kit.distributed.collectives import first_difference, gather_bytes
from ddp_kit.distributed.local_shard import is_split
from ddp_kit.distributed.tensors_from_rank import view_of
from ddp_kit.errors import DdpKitError, some
from ddp_kit.training.state import Training

# Numbers of a row, of which each has a weight of its own: a power of two.
ROW = 4096


def require_agreement(training: Training) -> None:
    """Compares the ranks' models at a step boundary, once a step. Every rank calls it.

    Raises: DdpKitError on every rank that names the first tensor that differs, and the ranks.
    """
    if training.agreed_step == training.step:
        return
    training.forward_state.look()
    for objective in training.objectives:
        objective.count.look()
    training.agreed_step = training.step
    if training.group.control_pg is None:
        return
    named = _whole_tensors(training)
    digests = digests_of(list(named.values()))
    text = json.dumps([digests, training.forward_state.attributes.saved()]).encode()
    if first_difference(training.group, [len(named), zlib.crc32(text)]) is None:
        return
    _tell(training, list(named), digests)


def _whole_tensors(training: Training) -> dict[str, torch.Tensor]:
    """Returns the tensors of which each rank has all."""
    model = training.model
    everything = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor for name, tensor in everything.items() if not is_split(tensor)}


def _tell(training: Training, names: list[str], digests: list[int]) -> None:
    """Raises: DdpKitError; always."""
    rows = gather_bytes(training.group, json.dumps([names, digests]).encode())
    every = [json.loads(row) for row in rows]
    said = "have other plain attributes of the model"
    for i, name in enumerate(names):
        held = [row[1][i] if row[0] == names else 0 for row in every]
        if len(set(held)) > 1:
            usual, _ = Counter(held).most_common(1)[0]
            others = [str(rank) for rank, digest in enumerate(held) if digest != usual]
            said = f"hold other values of {name}: rank {some(others)} unlike the rest"
            break
    raise DdpKitError(
        f"at step {training.step} the ranks {said}. Nothing of this step was saved. Something "
        "changes the model on one rank alone, or by what only that rank has seen: a callback, "
        "code that asks for the rank, weights written outside the forward pass."
    )


def digests_of(tensors: list[torch.Tensor]) -> list[int]:
    """Returns a checksum of each tensor's memory; those of a CUDA device in one synchronisation."""
    own: list[int | torch.Tensor] = []
    for tensor in tensors:
        memory = _memory(tensor)
        if memory.is_cuda:
            own.append(checksum(memory))
        else:
            own.append(zlib.crc32(view_of(memory)))
    on_device = [digest for digest in own if isinstance(digest, torch.Tensor)]
    read = iter(torch.stack(on_device).tolist() if on_device else ())
    return [next(read) if isinstance(digest, torch.Tensor) else digest for digest in own]


def _memory(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a tensor's bytes in the order of its memory, which is the same on all ranks."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    if not plain.is_contiguous():
        strides = plain.stride()
        order = sorted(range(plain.dim()), key=lambda at: -strides[at])
        plain = plain.permute(order).contiguous()
    return plain.reshape(-1).view(torch.uint8)


def checksum(memory: torch.Tensor) -> torch.Tensor:
    """Returns a checksum of bytes, computed where they are: each of a row of numbers counts
    otherwise, so that two that change places are seen.
    """
    size = len(memory) // 4 * 4
    if memory.storage_offset() % 4:
        memory = memory.clone()
    words = memory[:size].view(torch.int32)
    weights = 2 * torch.arange(ROW, device=memory.device) + 1
    whole = len(words) // ROW * ROW
    columns = words[:whole].view(-1, ROW).sum(0, dtype=torch.int64)
    rest = words[whole:].to(torch.int64)
    total = (columns * weights).sum() + (rest * weights[: len(rest)]).sum()
    return total + memory[size:].sum(dtype=torch.int64) + size
