"""Which checkpoints stay.

The newest and the best one are never deleted, nor anything that is no checkpoint of ours. Only rank
0 calls what changes a folder.
"""

import contextlib
import math
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from ddp_kit.checkpoint.format.layout import (
    FOLDER,
    JSON_LIMIT,
    MANIFEST,
    DamagedError,
    FormatError,
    Manifest,
    folder_of,
    parse_manifest,
    read_exactly,
)
from ddp_kit.checkpoint.format.storage import Storage
from ddp_kit.settings import EarlyStop, Settings


@dataclass(frozen=True, kw_only=True)
class Keep:
    """`newest` stay beside the best by `metric` (`mode` min or max; empty: none is best); multiples
    of `every` steps stay for ever.
    """

    newest: int = 3
    every: int = 0
    metric: str = ""
    mode: str = "min"


def steps(storage: Storage) -> list[int]:
    """Returns the steps of committed checkpoints, newest first. Whether they are whole is not
    looked at.
    """
    matches = [FOLDER.fullmatch(name) for name in storage.list("")]
    return sorted((int(match[1]) for match in matches if match), reverse=True)


def read_manifest(storage: Storage, step: int) -> Manifest:
    """Returns the manifest of a checkpoint. Raises: DamagedError, FormatError, OSError."""
    with storage.open(f"{folder_of(step)}/{MANIFEST}") as file:
        size = file.seek(0, 2)
        if size > JSON_LIMIT:
            raise DamagedError(f"{MANIFEST} has {size} bytes")
        file.seek(0)
        return parse_manifest(read_exactly(file, size, name=MANIFEST), step=step)


def best(manifests: list[Manifest], *, metric: str, mode: str) -> Manifest | None:
    """Returns the checkpoint with the best value of a metric, the earliest of equals; None if none
    has it.
    """
    sign = 1 if mode == "min" else -1
    ranked = []
    for manifest in manifests:
        value = float(manifest.metrics.get(metric, math.nan))
        if not math.isnan(value):
            ranked.append((sign * value, manifest.step, manifest))
    if not ranked:
        return None
    return min(ranked, key=lambda entry: entry[:2])[2]


def manifests_of(storage: Storage) -> list[Manifest]:
    """Returns all readable manifests, newest first."""
    found = []
    for step in steps(storage):
        with contextlib.suppress(DamagedError, FormatError, FileNotFoundError):
            found.append(read_manifest(storage, step))
    return found


def retire(storage: Storage, keep: Keep) -> None:
    """Deletes the checkpoints that the rule lets go: renamed first, so that none is ever seen
    half-deleted.
    """
    found = manifests_of(storage)
    stay = {manifest.step for manifest in found[: max(keep.newest, 1)]}
    if keep.metric:
        chosen = best(found, metric=keep.metric, mode=keep.mode)
        if chosen is not None:
            stay.add(chosen.step)
    for manifest in found:
        is_milestone = keep.every != 0 and manifest.step % keep.every == 0
        if manifest.step in stay or is_milestone:
            continue
        folder = folder_of(manifest.step)
        storage.rename(folder, f"{folder}.deleted")
        storage.sync("")
        storage.remove(f"{folder}.deleted")


def clear(storage: Storage, *, token: str = "") -> None:
    """Removes what killed attempts left: temporary folders, half-deleted and replaced ones. Whoever
    calls it is the only one who saves there.

    Args: `token` of the saves that are this attempt's own.
    """
    names = storage.list("")
    for name in names:
        step, _, rest = name.partition(".")
        is_temporary = rest.startswith("tmp-") and rest != f"tmp-{token}"
        is_leftover = is_temporary or rest in ("deleted", "replaced")
        if rest == "replaced" and step not in names:
            storage.rename(name, step)
        elif FOLDER.fullmatch(step) and is_leftover:
            storage.remove(name)


def set_aside_newer(storage: Storage, step: int) -> None:
    """Renames the checkpoints after `step` to `*.superseded`: the run goes back, and will write
    these steps again.
    """
    for newer in steps(storage):
        if newer > step:
            storage.rename(folder_of(newer), free_name(storage, f"{folder_of(newer)}.superseded"))


def free_name(storage: Storage, name: str) -> str:
    """Returns `name`, or with a number behind it if it is taken."""
    taken = storage.list("")
    number = 1
    free = name
    while free in taken:
        number += 1
        free = f"{name}-{number}"
    return free


def best_metric(rule: EarlyStop, names: Iterable[str]) -> str:
    """Returns the evaluation metric that decides: the early-stopping one, else the (first) loss; ""
    if there is neither.
    """
    if rule.metric:
        return rule.metric
    losses = (name for name in names if name == "loss" or name.endswith("/loss"))
    return next(losses, "")


def keep_of(settings: Settings, names: Iterable[str]) -> Keep:
    """Returns which checkpoints stay, `names` being those of an evaluation's metrics."""
    rule = settings.early_stop
    return Keep(
        newest=settings.keep,
        every=settings.keep_every,
        metric=best_metric(rule, names),
        mode=rule.mode if rule.metric else "min",
    )


def best_notes(rule: EarlyStop, names: Collection[str], *, has_test: bool) -> list[str]:
    """Says at start where "best" may be another one than was meant."""
    notes = []
    if rule.mode == "min" and re.search(r"acc|auc|auroc|f1|top[-_]?\d", rule.metric):
        notes.append(
            f"a smaller {rule.metric} counts as the better one: if it is the larger one, type "
            "--early-stop.mode max"
        )
    if has_test and names and not best_metric(rule, names):
        notes.append(
            "the last weights are the ones tested, not the best, since evaluation reports no loss: "
            "let it report one, or type "
            f"--early-stop.metric with one of {', '.join(names)}"
        )
    return notes
