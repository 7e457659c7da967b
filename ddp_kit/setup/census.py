"""What a forward pass changes of a model, seen before the first step: kept, or refused by name.

Buffers, weights and plain attributes are kept (`model_state.forward_state`). An attribute that
holds a tensor or another object is no part of a checkpoint; whether later passes read what earlier
ones have left in it is tried out.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ddp_kit.data.transfer import map_tensors
from ddp_kit.errors import ConfigError, some
from ddp_kit.model_state.images import same_bits
from ddp_kit.model_state.places import BUFFERS, PARAMETERS, Attribute
from ddp_kit.model_state.untouched import Changes, Snapshot
from ddp_kit.training.state import Training


class Census:
    """Compares a model before and after a pass."""

    def __init__(
        self,
        training: Training,
        before: Snapshot,
        *,
        seed: Callable[[], None],
        loss: Callable[[bool], torch.Tensor],
    ):
        """Args: `before` the model before the pass; `seed` seeds the generators for a pass; `loss`
        runs a forward pass, on its batch or, if it is given True, on another one.
        """
        self._training = training
        self._model = training.model
        self._before = before
        self._seed = seed
        self._loss = loss
        self._changes = Changes()
        self._total = math.nan
        self._middle: Snapshot | None = None
        self._changed_weights: list[str] = []

    @property
    def has_weights(self) -> bool:
        """Whether a forward pass changes parameters."""
        return any(place.register == PARAMETERS for place in self._changes.places)

    def begin(self) -> None:
        """Before the pass."""
        self._seed()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Around a forward pass: watches weights of which each rank has a part, where modules have
        them whole.
        """
        if self._training.strategy.shards is None:
            yield
            return
        names = {id(module): prefix for prefix, module in self._model.named_modules()}
        values: dict[int, dict[str, torch.Tensor]] = {}

        def before(module: nn.Module, inputs: Any) -> None:
            values[id(module)] = _own_weights(module)

        def after(module: nn.Module, inputs: Any, output: Any) -> None:
            found = values.pop(id(module), {})
            for key, parameter in module._parameters.items():
                if parameter is not None and not same_bits(parameter.detach(), found[key]):
                    self._changed_weights.append(f"{names[id(module)]}.{key}".lstrip("."))

        handles = []
        for module in self._model.modules():
            if module._parameters:
                handles.append(module.register_forward_pre_hook(before))
                # Before the hook that lets go of the whole weights.
                handles.append(module.register_forward_hook(after, prepend=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def after_forward(self, total: torch.Tensor) -> None:
        """After the forward pass, whose loss is `total`."""
        self._total = float(total.detach())
        self._changes = self._before.changes().untold()
        self._middle = Snapshot(
            self._model,
            has=lambda place: place.register == BUFFERS,
            has_attribute=self._training.forward_state.has_attribute,
        )

    def after_backward(self) -> None:
        """After the backward pass. One that runs the forward pass again changes buffers again."""
        assert self._middle is not None
        changes = self._middle.changes()
        if changes.places or changes.plain:
            self._training.forward_state.repeat_always()
        self._middle = None

    def take(self, *, trained: set[int], may_split: bool) -> None:
        """Gives what has changed to those who keep it. The model is as it was then.

        Args: `trained` parameters that an optimizer steps, by their identity; `may_split` whether
            ranks hold parts of the weights, or would if there were several.
        Raises: ConfigError for what cannot be kept.
        """
        changes = self._changes
        self._refuse(changes, may_split=may_split)
        if changes.other:
            self._refuse_carried(changes.other)
        self._before.put_back()
        self._training.forward_state.take(changes, trained=trained)

    def _refuse(self, changes: Changes, *, may_split: bool) -> None:
        if changes.built:
            raise ConfigError(
                f"the forward pass makes {some(changes.built)}, which no optimizer and no other "
                "rank knows of: make it in the recipe's model(), running one batch through it "
                "there if need be; a weight that changes is changed in place."
            )
        if changes.generators:
            names = [attribute.name for attribute in changes.generators]
            raise ConfigError(
                f"the forward pass draws from a generator of its own, {some(names)}, which no seed "
                "reaches and no checkpoint holds. Draw from the default generators of Python, "
                "NumPy or torch: they are seeded for each micro-batch."
            )
        weights = [place.name for place in changes.places if place.register == PARAMETERS]
        weights += self._changed_weights
        if weights and may_split:
            raise ConfigError(
                f"the forward pass changes the weights {some(weights)}, of which each rank has a "
                "part with this strategy. Type --strategy ddp, or zero1."
            )

    def _refuse_carried(self, others: list[Attribute]) -> None:
        """Raises: ConfigError for attributes by which a pass depends on those before it."""
        names = {attribute.name for attribute in others}
        if not self._is_carried(names):
            return
        alone = [name for name in sorted(names) if self._is_carried({name})]
        raise ConfigError(
            f"the forward pass reads what the one before has left in {some(alone or sorted(names))}"
            ", a plain attribute that holds a tensor or another object: no checkpoint has it, and "
            "each rank would have its own. Make it a buffer (register_buffer, persistent=False if "
            "it is a cache), and say in Recipe(buffers=...) what stays of it."
        )

    def _is_carried(self, names: set[str]) -> bool:
        """Whether a pass depends on what another has left in these attributes.

        A pass on another batch leaves something there. Then no two of these may differ: the first
        pass, and it once more, with all else put back; the pass that comes next in a run that goes
        on, with everything left, and in one that is resumed, which has all else.
        """
        self._before.put_back()
        self._total_of_a_pass(on_another=True)
        has_attribute = self._training.forward_state.has_attribute
        left = Snapshot(self._model, has=self._has, has_attribute=has_attribute)
        self._before.put_back(attributes=lambda name: name not in names)
        again = self._total_of_a_pass()
        left.put_back()
        going_on = self._total_of_a_pass()
        left.put_back()
        self._before.put_attributes_back(lambda name: name in names)
        resumed = self._total_of_a_pass()
        return not (_are_close(again, self._total) and _are_close(going_on, resumed))

    def _has(self, place: Any) -> bool:
        return self._training.strategy.shards is None or place.register == BUFFERS

    def _total_of_a_pass(self, *, on_another: bool = False) -> float:
        self._seed()
        try:
            return float(self._loss(on_another).detach())
        except Exception:
            # Whatever a model raises that finds what it does not expect.
            return math.inf


def all_like_the_first(batch: Any, size: int) -> Any:
    """Returns a batch of so many samples of which each is the first one: another batch of the same
    shapes.
    """

    def repeated(value: torch.Tensor) -> torch.Tensor:
        if value.is_nested or value.layout is not torch.strided:
            return value
        if value.dim() and len(value) == size:
            return value[:1].expand(value.shape).clone()
        return value

    return map_tensors(batch, repeated)


def _own_weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """Returns copies of the parameters that a module itself has."""
    found = {}
    for key, parameter in module._parameters.items():
        if parameter is not None:
            found[key] = parameter.detach().clone()
    return found


def _are_close(one: float, other: float) -> bool:
    """Whether two totals of the same pass differ by rounding at most."""
    both_nan = math.isnan(one) and math.isnan(other)
    return both_nan or math.isclose(one, other, rel_tol=1e-6)
