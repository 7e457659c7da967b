"""Which parameters have gradients: as the run has set it, epoch by epoch, and nobody else.

What a strategy wraps around a loss call is made for the parameters that were trained then. So a
change of `requires_grad` that only torch hears of would train ranks apart, or wait for a gradient.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Protocol, final

from torch import nn

from ddp_kit.errors import DdpKitError, flag_changed, some
from ddp_kit.io.logs import logger

_flag_of = attrgetter("requires_grad")


class Trains(Protocol):
    """What is asked of an objective: see `state.ObjectiveState`."""

    name: str
    parameters: list[nn.Parameter]
    frozen: list[nn.Parameter]


@final
class GradientFlags:
    """The `requires_grad` of a model's parameters, as the run has set it."""

    def __init__(self, model: nn.Module):
        self._named = list(model.named_parameters())
        # Of each objective that trains one of several parts, by its name, and of all as "".
        self._noted: dict[str, _Noted] = {}

    def note(self, objectives: Sequence[Trains]) -> None:
        """Takes them as they are now, between two steps."""
        self._noted = {"": _Noted(self._named)}
        for objective in objectives:
            if not objective.frozen:
                continue
            # What is changed of the other objectives' makes no difference in a step of this one.
            without = {id(parameter) for parameter in objective.frozen}
            named = [item for item in self._named if id(item[1]) not in without]
            self._noted[objective.name] = _Noted(named)

    def require(self, within: str = "") -> None:
        """Compares them, between two steps or within that of an objective of this name.

        Raises: DdpKitError that names those that somebody else has changed.
        """
        noted = self._noted.get(within)
        if noted is None:
            noted = self._noted[""]
        now = list(map(_flag_of, noted.parameters))
        if now == noted.flags:
            return
        changed: dict[bool, list[str]] = {False: [], True: []}
        for name, flag, before in zip(noted.names, now, noted.flags, strict=True):
            if flag != before:
                changed[flag].append(name)
        is_thawed = not changed[False]
        raise DdpKitError(flag_changed(changed[is_thawed], now=is_thawed))


class _Noted:
    """Some parameters, and the flags that they had."""

    def __init__(self, named: Sequence[tuple[str, nn.Parameter]]):
        self.names = [name for name, _ in named]
        self.parameters = [parameter for _, parameter in named]
        self.flags = list(map(_flag_of, self.parameters))


@final
class Freezing:
    """Freezes and thaws parameters where an epoch begins, on all ranks at the same step."""

    def __init__(
        self,
        model: nn.Module,
        frozen_in: Callable[[int], frozenset[str]],
        *,
        renew: Callable[[int], None],
    ):
        """Args: `frozen_in` returns the names of what is frozen in an epoch, the same on all ranks;
        `renew` wraps the loss call of an objective, by its place among them, for what is trained
        now.
        """
        self._frozen_in = frozen_in
        self._renew = renew
        self._parameters: dict[str, nn.Parameter] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self._parameters[name] = parameter
        self._epoch = -1
        # Names of objectives whose optimizer has not stepped since the last change.
        self._unseen: set[str] = set()
        self._frozen: frozenset[str] = frozenset()

    def enter(self, epoch: int, *, objectives: Sequence[Trains], flags: GradientFlags) -> None:
        """Before each step: freezes what is frozen in its epoch. Every rank calls it.

        Raises: ConfigError or DdpKitError for what cannot be trained so.
        """
        if epoch == self._epoch:
            return
        frozen = self._frozen_in(epoch)
        self._epoch = epoch
        changed = frozen ^ self._frozen
        self._frozen = frozen
        if not changed:
            return
        for name in changed:
            self._parameters[name].requires_grad_(name not in frozen)
        trained = [parameter for parameter in self._parameters.values() if parameter.requires_grad]
        moved = {id(self._parameters[name]) for name in changed}
        for objective in objectives:
            own = {id(parameter) for parameter in objective.parameters}
            objective.frozen = [parameter for parameter in trained if id(parameter) not in own]
        flags.note(objectives)
        self._unseen = {objective.name for objective in objectives}
        for i, objective in enumerate(objectives):
            if any(id(parameter) in moved for parameter in objective.parameters):
                self._renew(i)
        logger.info("epoch %d: frozen are %s", epoch, some(sorted(frozen)) or "no parameters")

    @contextmanager
    def watched(self, objective: Trains) -> Iterator[None]:
        """Around a step of an objective's optimizer, the first one with what is frozen now.

        Raises: DdpKitError if it moves what is frozen: by its momentum, or to keep ranks in step.
        """
        frozen: dict[str, nn.Parameter] = {}
        if objective.name in self._unseen:
            self._unseen.remove(objective.name)
            own = {id(parameter) for parameter in objective.parameters}
            for name in self._frozen:
                if id(self._parameters[name]) in own:
                    frozen[name] = self._parameters[name]
        versions = {name: parameter._version for name, parameter in frozen.items()}
        yield
        moved = [name for name, parameter in frozen.items() if parameter._version != versions[name]]
        if moved:
            raise DdpKitError(
                f"the optimizer moves {some(sorted(moved))}, which Recipe(frozen=...) freezes in "
                f"epoch {self._epoch}: it does not leave parameters alone that have no gradient. "
                "Take another optimizer, or freeze them for the whole run, by a list, and build "
                "the optimizer from those that have requires_grad."
            )
