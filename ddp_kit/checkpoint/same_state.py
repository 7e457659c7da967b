"""Whether a state is the same on all ranks, and a checkpoint that of the run which is built."""

import json
import zlib
from collections.abc import Mapping
from typing import Any

from ddp_kit.checkpoint.extra_state import require_same_modules
from ddp_kit.checkpoint.format.encoding import references
from ddp_kit.checkpoint.format.fit import Kind
from ddp_kit.checkpoint.format.opened import Opened
from ddp_kit.checkpoint.kinds import require_same_kinds
from ddp_kit.checkpoint.optimizer_rest_back import require_restorable
from ddp_kit.checkpoint.weights import bytes_of
from ddp_kit.distributed.collectives import first_difference
from ddp_kit.distributed.local_shard import Item, memory_of
from ddp_kit.errors import ConfigError
from ddp_kit.training.ema import WeightAverage
from ddp_kit.training.state import Training

AVERAGES = "ema/"
SMALL = 4096  # elements of a tensor up to which ranks compare its content, not its shape alone


def require_equal_on_ranks(
    training: Training,
    objectives: list[dict[str, Any]],
    extra: Mapping[str, Any],
    items: Mapping[str, Item],
) -> None:
    """Compares what modules and optimizers keep of their own. Every rank calls it.

    Raises: ConfigError on every rank for what differs: it is saved once, for all of them.
    """
    found = {f"get_extra_state of {name or 'the model'}": state for name, state in extra.items()}
    for entry in objectives:
        found[f"what {entry['optimizer']} keeps beside its parameters' state"] = entry["rest"]
    numbers = [_checksum(state, items) for state in found.values()]
    at = first_difference(training.group, numbers)
    if at is not None:
        raise ConfigError(
            f"{list(found)[at]} differs between the ranks, and a checkpoint holds it once. Let it "
            "depend on what is equal on all of them, such as summed gradients, or leave it out."
        )


def _checksum(value: Any, items: Mapping[str, Item]) -> int:
    """Returns a number by which ranks compare encoded values and the small tensors in them."""
    crc = zlib.crc32(json.dumps(value, sort_keys=True).encode())
    for name in references(value):
        tensor = memory_of(items[name])
        crc = zlib.crc32(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode(), crc)
        if tensor.numel() <= SMALL:
            crc = zlib.crc32(bytes_of(tensor), crc)
    return crc


def match_average(
    found: dict[str, Kind], targets: dict[str, Item], average: WeightAverage | None
) -> bool:
    """Takes the average out of what a checkpoint has where it ends, and out of what is wanted where
    it begins. Returns whether it begins.
    """
    saved = [name for name in found if name.startswith(AVERAGES)]
    if average is None:
        for name in saved:
            del found[name]
        return False
    if saved:
        return False
    for name in list(targets):
        if name.startswith(AVERAGES):
            del targets[name]
    return True


def require_same_run(
    opened: Opened,
    training: Training,
    saved: Mapping[str, Any],
    *,
    keeps_hyperparameters: bool,
) -> None:
    """Raises: ConfigError if a checkpoint has other objectives, other parameter groups, another
    kind of optimizer or another frozen base than the run.
    """
    own_groups = {
        objective.name: len(objective.optimizer.param_groups) for objective in training.objectives
    }
    if {name: len(entry["groups"]) for name, entry in saved.items()} != own_groups:
        raise ConfigError(
            f"{opened.folder} has other objectives or parameter groups than this recipe."
        )
    for objective in training.objectives:
        require_same_kinds(
            objective,
            saved[objective.name],
            where=opened.folder,
            keeps_hyperparameters=keeps_hyperparameters,
        )
        require_restorable(objective, saved[objective.name].get("rest", {}), where=opened.folder)
    if "extra" in opened.values:
        require_same_modules(opened.values["extra"], training.model, where=opened.folder)
    saved_base = opened.values["base_sha256"]
    if bool(saved_base) != bool(training.base_sha256):
        held = "the trained weights alone" if saved_base else "all weights"
        raise ConfigError(
            f"{opened.folder} holds {held}: --save-trainable-only cannot change in the course of a "
            "run, with --change or without. Type it as it was, or begin a new run from these "
            "weights: --init-from."
        )
    if saved_base != training.base_sha256:
        raise ConfigError(
            f"{opened.folder} was saved over frozen weights of SHA-256 "
            f"{saved_base[:12]}; this life has "
            f"{training.base_sha256[:12]}. "
            "Start from the same base: --init-from as the first life had it."
        )
