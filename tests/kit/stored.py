"""Checkpoints for the tests: written by any number of ranks in one process, and broken in every way."""

import json
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from lives import alone

from ddp_kit.checkpoint.format.commit import Ranks, commit
from ddp_kit.checkpoint.format.layout import NAMES, Manifest
from ddp_kit.checkpoint.format.reader import Opened, open_newest
from ddp_kit.checkpoint.format.staging import Staging
from ddp_kit.checkpoint.format.storage import Storage

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Threads(Ranks):
    """Ranks that are threads of this process: they gather through a list."""

    meeting: threading.Barrier
    rows: list[bytes] = field(default_factory=list)

    def gather(self, content: bytes) -> list[bytes]:
        self.rows[self.rank] = content
        self.meeting.wait(20)
        every = list(self.rows)
        self.meeting.wait(20)
        return every


def state(step: int = 0) -> dict[str, torch.Tensor]:
    """Returns tensors of every awkward kind, other ones at every step."""
    generator = torch.Generator().manual_seed(step)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "model/weight": drawn(37, 11),
        "model/conv": drawn(8, 3, 3, 3).to(memory_format=torch.channels_last),
        "model/half": drawn(5, 6).bfloat16(),
        "model/turned": drawn(9, 4).T,
        "model/row": drawn(1, 40),
        "model/none": torch.empty(0),
        "model/no_columns": torch.empty(3, 0),
        "model/scalar": torch.tensor(step),
        "model/mask": drawn(7) > 0,
        "optimizer/model/weight/step": torch.tensor(float(step)),
        "optimizer/model/weight/exp_avg": drawn(37, 11).double(),
    }


def values(tensors: Mapping[str, torch.Tensor], **more: Any) -> dict[str, Any]:
    return {
        "tensors": {
            name: [list(tensor.shape), NAMES[tensor.dtype]] for name, tensor in tensors.items()
        },
        "best": "nan",
        **more,
    }


def write(
    storage: Storage,
    step: int,
    *,
    world_size: int = 2,
    tensors: Mapping[str, torch.Tensor] | None = None,
    **facts: Any,
) -> None:
    """Commits a checkpoint from `world_size` ranks. `facts` go into the manifest, `values` is the content of state.json."""
    tensors = state(step) if tensors is None else tensors
    content = json.dumps(
        facts.pop("values", values(tensors, step=step, run_id=facts.get("run_id", "run")))
    ).encode()
    token = facts.pop("token", "life")
    manifest = Manifest(
        **{
            "run_id": "run",
            "step": step,
            "world_size": world_size,
            "settings_sha256": "",
            "time": 1.5,
            **facts,
        }
    )
    meeting, rows = threading.Barrier(world_size), [b""] * world_size

    def rank(number: int) -> int:
        shard = (
            Staging(rank=number, world_size=world_size, device=CPU).copy(tensors, first={}).content
        )
        ranks = Threads(number, world_size, meeting=meeting, rows=rows)
        return commit(storage, ranks, shard=shard, state=content, manifest=manifest, token=token)

    with ThreadPoolExecutor(world_size) as pool:
        written = list(pool.map(rank, range(world_size)))
    assert written == [written[0]] * world_size


def newest(storage: Storage) -> tuple[Opened | None, list[str]]:
    """Returns the newest good checkpoint, and what was said about the damaged ones before it."""
    found, notes = None, []
    for opened, note in open_newest(storage, group=alone(), sets_aside=True):
        found = opened
        notes += [note] if note else []
    return found, notes


def is_equal(opened: Opened, tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether a checkpoint holds exactly these tensors, bit for bit."""
    targets = {name: torch.full_like(tensor, 1) for name, tensor in tensors.items()}
    opened.copy_into(targets)
    return set(opened.kinds) == set(tensors) and all(
        torch.equal(targets[name], tensor) for name, tensor in tensors.items()
    )
