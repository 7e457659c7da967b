"""Whether all ranks still hold the same weights and buffers.

Compared at each save and evaluation, and beside training every so many steps: then the digest
travels in the control packet, and nobody waits for it. Ranks stay equal because they do the same
with equal numbers. Whatever breaks that (a callback on one rank, a loss that writes into the model,
a broken device) would end in a checkpoint of rank 0's half of the truth.
"""

import json
import zlib
from collections import Counter
from collections.abc import Sequence

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
    if training.group.control_pg is not None:
        held = _Held(training)
        if first_difference(training.group, [len(held.names), held.digest()]) is not None:
            _tell(training, held)
    training.agreed_step = training.step


class Sentinel:
    """Compares the ranks' models beside training. Every rank calls `look` after each step."""

    def __init__(self, training: Training, *, every: int):
        """Args: `every` so many steps, 0: never."""
        self._training = training
        self._every = every
        if training.group.control_pg is None:
            self._every = 0
        # One is on its way at most, with steps of microseconds over several of them.
        self._sent: _Held | None = None
        # What another loop has sent tells nothing of this one.
        training.control_packet.take_verdict()

    def look(self, *, is_compared: bool) -> None:
        """Reads what has come back, and sends the digest that is due.

        Args: `is_compared` whether the models are compared at this step anyway.
        Raises: DdpKitError as `require_agreement`, some steps later.
        """
        if not self._every:
            return
        training = self._training
        if self._sent is not None:
            verdict = training.control_packet.take_verdict()
            if verdict is None:
                return
            sent = self._sent
            self._sent = None
            if not verdict:
                _tell(training, sent)
            training.agreed_step = max(training.agreed_step, sent.step)
        if training.step % self._every == 0 and not is_compared:
            self._sent = _Held(training)
            training.control_packet.compare(self._sent.digest)


class _Held:
    """What this rank holds at one step, of which every rank should hold the same."""

    def __init__(self, training: Training):
        self.step = training.step
        tensors = _whole_tensors(training)
        self.names = list(tensors)
        self._digests = Digests(list(tensors.values()))
        self._attributes = json.dumps(training.forward_state.attributes.saved())

    def digests(self) -> list[int]:
        """Returns one for each name."""
        return self._digests.read()

    def digest(self) -> int:
        """Returns one for all."""
        text = json.dumps([self.digests(), self._attributes]).encode()
        return zlib.crc32(text)


def holds_copies(training: Training) -> bool:
    """Whether the ranks have whole weights, which can be compared."""
    return any(not is_split(parameter) for parameter in training.model.parameters())


def _whole_tensors(training: Training) -> dict[str, torch.Tensor]:
    """Returns the tensors of which each rank has all."""
    model = training.model
    everything = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor for name, tensor in everything.items() if not is_split(tensor)}


def _tell(training: Training, held: _Held) -> None:
    """Raises: DdpKitError; always."""
    rows = gather_bytes(training.group, json.dumps([held.names, held.digests()]).encode())
    every = [json.loads(row) for row in rows]
    different = []
    for i, name in enumerate(held.names):
        digests = [row[1][i] if row[0] == held.names else 0 for row in every]
        if len(set(digests)) > 1:
            different.append((name, digests))
    said = "the ranks have other plain attributes of the model"
    if different:
        name, digests = different[0]
        said = f"{_who(digests)} in {name} ({len(different)} of {len(held.names)} tensors)"
    last = "not compared before in this attempt"
    if training.agreed_step >= 0:
        last = f"last agreed at step {training.agreed_step}"
    raise DdpKitError(
        f"DIVERGED at step {held.step}: {said}; {last}. Nothing since then was saved. Something "
        "changes the model on one rank alone, or by what only that rank has seen: a callback, "
        "code that asks for the rank, weights written outside the forward pass. Or a device "
        "miscalculates: --sdc-check 100 looks for that."
    )


def _who(digests: Sequence[int]) -> str:
    """Returns which ranks differ: from most of the others, or all where no most are alike."""
    usual, count = Counter(digests).most_common(1)[0]
    if 2 * count <= len(digests):
        return f"ranks {some([str(rank) for rank in range(len(digests))])} differ"
    others = [str(rank) for rank, digest in enumerate(digests) if digest != usual]
    if len(others) == 1:
        return f"rank {others[0]} differs from the others"
    return f"ranks {some(others)} differ from the others"


def digests_of(tensors: list[torch.Tensor]) -> list[int]:
    """Returns a checksum of each tensor's memory; those of a CUDA device in one synchronisation."""
    return Digests(tensors).read()


class Digests:
    """A checksum of each tensor's memory as it is now, computed where it is."""

    def __init__(self, tensors: Sequence[torch.Tensor]):
        """Those of a CUDA device are on their way to the host when this returns."""
        self._own: list[int | None] = []
        on_device = []
        for tensor in tensors:
            memory = _memory(tensor)
            if memory.is_cuda:
                on_device.append(checksum(memory))
                self._own.append(None)
            else:
                self._own.append(zlib.crc32(view_of(memory)))
        self._arriving: torch.Tensor | None = None
        self._event: torch.cuda.Event | None = None
        if on_device:
            found = torch.stack(on_device)
            self._arriving = torch.empty_like(found, device="cpu", pin_memory=True)
            self._arriving.copy_(found, non_blocking=True)
            self._event = torch.cuda.current_stream().record_event()

    def read(self) -> list[int]:
        """Returns them, in the order of the tensors."""
        arrived: list[int] = []
        if self._arriving is not None and self._event is not None:
            self._event.synchronize()
            arrived = self._arriving.tolist()
        waiting = iter(arrived)
        return [next(waiting) if digest is None else digest for digest in self._own]


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
