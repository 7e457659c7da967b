"""`Recipe(frozen=...)`: which parameters are frozen, by patterns of names, for good or by epoch."""

import json
import zlib
from collections.abc import Callable, Collection, Sequence
from fnmatch import fnmatchcase
from typing import final

from torch import nn

from ddp_kit.data.loader import Feed
from ddp_kit.data.seeding import made_under_seed
from ddp_kit.distributed.collectives import first_difference, gather_bytes
from ddp_kit.distributed.process_group import Group
from ddp_kit.errors import ConfigError, nearest, some
from ddp_kit.recipe import Recipe
from ddp_kit.setup.parts import part_of
from ddp_kit.training.loop import Cadence

Frozen = Sequence[str] | Callable[[int], Sequence[str]]
# Epochs that are looked at before the first step.
MOST_LOOKED_AT = 1000


def freeze_for_good(model: nn.Module, frozen: Frozen) -> None:
    """Freezes what a list of patterns names, for the whole run. A function is asked later.

    Raises: ConfigError for what is no list of patterns, or a pattern of nothing.
    """
    if callable(frozen):
        return
    said = "Recipe(frozen=...)"
    names = _matched(_Names(model), _patterns_in(frozen, said=said), said=said)
    for name, parameter in model.named_parameters():
        if name in names:
            parameter.requires_grad_(False)


class _Names:
    """The names of a model's parameters."""

    def __init__(self, model: nn.Module):
        named = dict(model.named_parameters())
        first = {id(parameter): name for name, parameter in named.items()}
        # A tied one has several, of which the first stands for it.
        self.every: dict[str, str] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self.every[name] = first[id(parameter)]
        self.trained = {name for name, parameter in named.items() if parameter.requires_grad}


@final
class FrozenNames:
    """What `Recipe(frozen=function)` freezes in an epoch: asked once, the same on all ranks."""

    def __init__(
        self,
        model: nn.Module,
        frozen: Callable[[int], Sequence[str]],
        *,
        parts: Collection[str],
        group: Group,
        seed: int,
    ):
        """Args: `parts` of the model that the objectives train."""
        self._frozen = frozen
        self._group = group
        self._seed = seed
        self._names = _Names(model)
        self._parts: dict[str, set[str]] = {}
        name_of = {id(parameter): name for name, parameter in model.named_parameters()}
        for trains in parts:
            own = {name_of[id(parameter)] for parameter in part_of(model, trains).parameters()}
            self._parts[trains] = own & self._names.trained
        self._known: dict[int, frozenset[str]] = {}

    def __call__(self, epoch: int) -> frozenset[str]:
        """Returns the names of what is frozen in an epoch. Every rank calls it."""
        if epoch not in self._known:
            self.look([epoch])
        return self._known[epoch]

    def look(self, epochs: Collection[int]) -> None:
        """Asks what is frozen in these epochs. Every rank calls it.

        Raises: ConfigError, naming the epoch, for what is no list of patterns, a pattern of
            nothing, an epoch in which nothing is trained, and ranks that differ.
        """
        answers: dict[tuple[str, ...], frozenset[str]] = {}
        for epoch in epochs:
            said = f"Recipe(frozen=...) in epoch {epoch}"
            answer = made_under_seed(self._frozen, epoch, seed=self._seed, what=f"frozen {epoch}")
            patterns = _patterns_in(answer, said=said)
            if patterns not in answers:
                answers[patterns] = _matched(self._names, patterns, said=said)
                self._require_rest(answers[patterns], said=said)
            self._known[epoch] = answers[patterns]
        self._require_same(list(epochs))

    def _require_rest(self, frozen: frozenset[str], *, said: str) -> None:
        for trains, own in self._parts.items():
            if own <= frozen:
                what = f"of Objective(trains={trains!r}) " if trains else ""
                raise ConfigError(f"{said} freezes every parameter {what}that would be trained.")

    def _require_same(self, epochs: Sequence[int]) -> None:
        texts = [json.dumps(sorted(self._known[epoch])) for epoch in epochs]
        at = first_difference(self._group, [zlib.crc32(text.encode()) for text in texts])
        if at is None:
            return
        every = [json.loads(row) for row in gather_bytes(self._group, texts[at].encode())]
        rank = next(rank for rank, names in enumerate(every) if names != every[0])
        raise ConfigError(
            f"Recipe(frozen=...) in epoch {epochs[at]} freezes {some(every[0]) or 'nothing'} on "
            f"rank 0 and {some(every[rank]) or 'nothing'} on rank {rank}. It must be a function of "
            "the epoch alone."
        )


def frozen_in(
    model: nn.Module, recipe: Recipe, *, feed: Feed, group: Group, cadence: Cadence
) -> FrozenNames | None:
    """Returns what `frozen_names` does of a recipe and all epochs of its run."""
    return frozen_names(
        model,
        recipe.frozen,
        parts=[part.trains for part in recipe.parts()],
        feed=feed,
        group=group,
        epochs=cadence.last_epoch(cadence.end) + 1,
    )


def frozen_names(
    model: nn.Module,
    frozen: Frozen,
    *,
    parts: Collection[str],
    feed: Feed,
    group: Group,
    epochs: int = 1,
) -> FrozenNames | None:
    """Returns what is frozen in which epoch, None where that never changes. Every rank calls it.

    Args: `parts` of the model that objectives train; `epochs` of the run, as far as is known.
    Raises: ConfigError for what cannot be frozen so.
    """
    if not callable(frozen):
        return None
    if feed.data.sharded and not feed.steps_per_epoch:
        raise ConfigError(
            "Recipe(frozen=...) is a function of the epoch, and the ranks' own streams "
            "(sharded=True) have no epochs in common. Give them __len__."
        )
    names = FrozenNames(model, frozen, parts=parts, group=group, seed=feed.seed)
    names.look(range(min(epochs, MOST_LOOKED_AT)))
    return names


def _patterns_in(answer: object, *, said: str) -> tuple[str, ...]:
    """Raises: ConfigError for anything but a list of texts."""
    if isinstance(answer, list | tuple) and all(isinstance(item, str) for item in answer):
        return tuple(answer)
    raise ConfigError(
        f"{said} is {answer!r}; expected a list of patterns of parameters' names, such as "
        '["backbone.*"]; [] freezes nothing.'
    )


def _matched(names: _Names, patterns: Sequence[str], *, said: str) -> frozenset[str]:
    """Returns the names of the parameters that patterns freeze.

    Raises: ConfigError for a pattern without effect.
    """
    found: set[str] = set()
    for pattern in patterns:
        matched = {own for name, own in names.every.items() if fnmatchcase(name, pattern)}
        if not matched:
            near = nearest(pattern, names.every)
            hint = f"did you mean {near!r}?" if near else f"it has {some(list(names.every))}."
            raise ConfigError(
                f"{said}: the model has no parameter named {pattern!r}; {hint} Patterns are those "
                'of fnmatch: "backbone.*".'
            )
        if not matched & names.trained:
            raise ConfigError(
                f"{said}: {pattern!r} names only parameters that the model itself has frozen "
                "for the whole run. Leave requires_grad to Recipe(frozen=...), or leave this out."
            )
        found |= matched & names.trained
    return frozenset(found)
