"""Going on where an earlier attempt of a run stopped: what may differ from it, and what may not.

A difference that nobody named would make one run of two experiments: it is refused, with a table.
What is free to change changes nothing about the experiment.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from ddp_kit.checkpoint.checkpointer import Checkpointer
from ddp_kit.checkpoint.format.encoding import decode
from ddp_kit.checkpoint.format.opened import Opened
from ddp_kit.checkpoint.state_dict import restore_state
from ddp_kit.config.rules import rules
from ddp_kit.config.secrets import is_secret_setting
from ddp_kit.data.cursor import Cursor, cursor_for
from ddp_kit.data.iterable import StreamPosition
from ddp_kit.data.loader import Feed
from ddp_kit.errors import ConfigError
from ddp_kit.io.logs import REDACTED
from ddp_kit.io.tables import aligned
from ddp_kit.settings import Settings, flag, flatten
from ddp_kit.stopping.early_stopping import EarlyStopping
from ddp_kit.training.state import Training

# What says nothing about the experiment: fields, and groups of them.
FREE = {name for name, rule in rules(Settings).items() if rule.is_free}
RECIPE = "recipe's text"
OTHER_RULE = {"early_stop.metric", "early_stop.mode"}
DATA = "training data"
# What --change calls that which is no field.
WORDS = {RECIPE: "recipe", DATA: "data"}
SEALED = "pbkdf2:"  # no JSON text begins so
ROUNDS = 100_000  # 0.05 s: a short password should not be found by trying


def binding(settings: Settings, *, recipe: str, data: str = "") -> dict[str, str]:
    """Returns what a later attempt must share, as {name: JSON text}: all settings but the free
    ones, the recipe's hash, and how much data there are (`described`; "": left out).

    Checkpoints hold it and may be given away: a secret's text is replaced by a hash.
    """
    free = set(FREE)
    if settings.epochs:
        free.add("max_steps")
    if settings.exact:
        free.discard("threads")
    bound = {}
    for name, text in flatten(settings).items():
        if name.split(".")[0] in free:
            continue
        bound[name] = _sealed(name, text) if is_secret_setting(name, text) else text
    bound[RECIPE] = recipe
    if data:
        bound[DATA] = data
    return bound


def described(feed: Feed) -> str:
    """Returns how much training data there are, in words."""
    if feed.streams is not None:
        return f"each rank's own, {feed.streams.shortest or 'an unknown number of'} samples"
    size = feed.data.shared_length
    if not size:
        return "of unknown length"
    words = f"{size} samples"
    return words if feed.length == size else f"{words}, {feed.length} an epoch"


def told_data(feed: Feed, *, world_size: int) -> dict[str, str]:
    """Returns what a loop of one's own must share of its data with a checkpoint, in words."""
    told = {DATA: described(feed)}
    if feed.data.sharded:
        told[f"ranks of the {DATA}"] = str(world_size)
    return told


def _sealed(name: str, text: str) -> str:
    return SEALED + hashlib.pbkdf2_hmac("sha256", text.encode(), name.encode(), ROUNDS).hex()


def _is_same(name: str, old: str | None, new: str | None) -> bool:
    """Whether two texts of a setting are equal, either of which may be sealed: checkpoints of
    before hold secrets as they are.
    """
    if old == new or old is None or new is None:
        return old == new
    if new.startswith(SEALED) and not old.startswith(SEALED):
        old = _sealed(name, old)
    if old.startswith(SEALED) and not new.startswith(SEALED):
        new = _sealed(name, new)
    return old == new


def differences(old: Mapping[str, Any], new: Mapping[str, str]) -> list[str]:
    """Returns the names of what differs. A setting that the old attempt did not know had today's
    default; of its data it may not have told.
    """
    defaults = flatten(Settings())
    if DATA in new:
        defaults[DATA] = new[DATA]
    return [
        name
        for name in {**old, **new}
        if not _is_same(name, old.get(name, defaults.get(name)), new.get(name))
    ]


def require_unchanged(
    opened: Opened, new: Mapping[str, str], *, change: tuple[str, ...]
) -> list[str]:
    """Returns the names that differ and were named.

    Raises: ConfigError with a table of those that were not.
    """
    old = opened.values["settings"]
    names = {name.lstrip("-").replace("-", "_") for name in change}
    allowed = []
    refused = []
    for name in differences(old, new):
        if WORDS.get(name, name) in names:
            allowed.append(name)
        else:
            refused.append(name)
    if not refused:
        return allowed
    rows = [("setting", "checkpoint", "now")]
    for name in refused:
        was = _shown(name, old.get(name))
        called = name if name == DATA else flag(name)
        rows.append((called, was, _shown(name, new.get(name))))
    table = "\n".join(f"  {line}" for line in aligned(rows))
    words = " ".join(WORDS.get(name, name) for name in refused)
    raise ConfigError(
        f"the run in {opened.folder} was started with other settings:\n{table}\n"
        f"Type them as they were, or --change {words} to go on with the new ones, or another "
        "--run-dir."
    )


def _shown(name: str, text: Any) -> str:
    """Returns a setting's text for a table: no secret, and no more than a line."""
    if text is None:
        return "-"
    if not isinstance(text, str):
        return str(text)[:40]
    if name == RECIPE:
        # A hash, of which some digits are enough.
        return text[:12]
    if name == DATA:
        return text
    if text.startswith(SEALED) or is_secret_setting(name, text):
        return REDACTED
    return text[:40]


def resume(
    opened: Opened,
    training: Training,
    *,
    feed: Feed,
    settings: Settings,
    new: Mapping[str, str],
    early_stopping: EarlyStopping,
) -> list[str]:
    """Puts an attempt into the state of a checkpoint. Every rank calls it. Returns the settings
    that were changed on purpose.

    Raises: ConfigError for a checkpoint that does not fit, with nothing changed.
    """
    changed = require_unchanged(opened, new, change=settings.change)
    cursor, again = _cursor_in(opened, feed, changed=changed)
    schedule_at = cursor.batches(opened.values["step"]) if settings.epochs else None
    # What was best by another metric says nothing.
    is_other_rule = not OTHER_RULE.isdisjoint(changed)
    restore_state(
        opened,
        training,
        early_stopping=None if is_other_rule else early_stopping,
        keeps_hyperparameters=not changed,
        schedule_at=schedule_at,
    )
    training.cursor.take(cursor)
    if again:
        training.notes.append(
            f"the place in the data is rounded down to a whole global batch: {again} samples come "
            "again in this epoch"
        )
    assert isinstance(training.checkpoints, Checkpointer)
    training.checkpoints.resumed(opened)
    return changed


def _cursor_in(opened: Opened, feed: Feed, *, changed: Sequence[str]) -> tuple[Cursor, int]:
    """Returns where a run goes on in its data, and how many samples come again."""
    values = opened.values
    known = values.get("cursor") or {}
    cursor = Cursor(ahead=known.get("ahead", 0), samples_ahead=known.get("samples_ahead", 0))
    if "global_batch" not in changed and DATA not in changed:
        return cursor, 0
    global_batch = int(values["settings"]["global_batch"])
    # Checkpoints of before do not tell.
    steps_per_epoch = known.get("length", feed.length) // global_batch
    step = values["step"]
    told = cursor.told(step, global_batch=global_batch, steps_per_epoch=steps_per_epoch)
    batches_before = told["epoch"] * steps_per_epoch
    told["offset"] = (cursor.batches(step) - batches_before) * global_batch
    goes_on = feed.progress is not None and feed.progress.begin is not None
    return cursor_for(
        told, global_batch=feed.plan.global_batch, length=feed.length, goes_on=goes_on
    )


def resume_data(opened: Opened, feed: Feed, *, world_size: int, restarts: bool) -> None:
    """Puts a data set with a state of its own where the checkpoint's ranks had it. Every rank calls
    it.

    Raises: ConfigError at another number of ranks, unless the data may be read again from their
        start (`restarts`); then too if they are each rank's own.
    """
    wrote = opened.manifest.world_size
    if feed.data.sharded and wrote != world_size:
        raise ConfigError(
            f"the training data of {opened.folder} are each rank's own (sharded=True) on {wrote} "
            f"ranks, and there are {world_size} now, which would have other samples. Start "
            f"{wrote} ranks, or a new run with its weights: --init-from."
        )
    if feed.progress is None:
        return
    places = opened.values.get("data")
    if restarts or not places:
        return
    if len(places) != world_size:
        raise ConfigError(
            f"{opened.folder} holds the training data's own state on {len(places)} ranks, and "
            f"there are {world_size} now. "
            f"Start {len(places)} ranks, or type --resume-data restart to read the data from its "
            "start."
        )
    place = places[feed.rank]
    begin = StreamPosition(place["epoch"], place["position"], decode(place["state"], {}))
    feed.progress.begin = begin
    # A save may come before the first batch: that of an evaluation which the attempt before owed.
    feed.progress.note(opened.manifest.step, begin)
