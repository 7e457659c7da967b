"""The dry run: passes before the first step, on a micro-batch that is the same on all ranks.

They find out how the loss's count will be known and what a forward pass changes, and faults show
there and not hours later. They leave no trace: gradients are dropped, and everything of the model
and the generators is put back after each pass. There are as many passes at any number of ranks.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ddp_kit.data.agreement import require_own_samples, require_same_samples
from ddp_kit.data.loader import Feed
from ddp_kit.data.seeding import seed_forward
from ddp_kit.distributed.collectives import first_difference, max_over_ranks
from ddp_kit.distributed.process_group import Group
from ddp_kit.errors import ConfigError, DdpKitError, no_gradient
from ddp_kit.metrics import Sums
from ddp_kit.model_state.untouched import untouched
from ddp_kit.setup.census import Census, all_like_the_first
from ddp_kit.strategies import Wrapped
from ddp_kit.training.answers import require_pairs
from ddp_kit.training.growth import means_among, note_of_loss, note_of_metrics
from ddp_kit.training.known_count import TOLERANCE, KnownCount
from ddp_kit.training.loss_count import Count, FixedCount, FoundCount
from ddp_kit.training.nonfinite import samples_named
from ddp_kit.training.state import LossCall, Training


class DryRun:
    """One per run. Every rank runs each objective's loss in it, in the same order."""

    def __init__(
        self, training: Training, feed: Feed, *, allows_unused: bool, may_split: bool = False
    ):
        """Args: `allows_unused` whether parameters may stay without a gradient; `may_split` whether
        ranks hold parts of the weights, or would if there were several.
        Raises: DataError on every rank if the ranks read different samples.
        """
        self.training = training
        self._feed = feed
        self._allows_unused = allows_unused
        self._may_split = may_split
        # Whether a forward pass changes weights.
        self._changes_weights = False
        self._batch = feed.dry_run_batch()
        what = "training data"
        if feed.data.sharded:
            require_own_samples(training.group, self._batch.batch, what=what)
        else:
            require_same_samples(
                training.group,
                self._batch.batch,
                what=what,
                is_iterable=feed.data.is_iterable,
            )

    def run(
        self,
        call: LossCall,
        optimizer: Optimizer,
        parameters: Sequence[nn.Parameter],
        frozen: Sequence[nn.Parameter],
        *,
        forward_key: int,
        trains: str = "",
    ) -> tuple[Wrapped, Count]:
        """Runs and wraps the call of a loss that trains `parameters`. Every rank calls it.

        Args: `forward_key` of the objective, for its draws; `trains` its part of the model.

        Returns: the wrapped call, ready for the first step, and how the loss's count will be known.
        Raises: ConfigError or DdpKitError on every rank, naming the parameter or layer.
        """
        training = self.training
        is_whole = training.strategy.shards is None
        has_attribute = training.forward_state.has_attribute

        def seed(draws: int = 0) -> None:
            seed_forward(forward_key, 0, draws, device=training.group.device)

        with _only(parameters, frozen):
            with untouched(
                training.model, weights=is_whole, has_attribute=has_attribute
            ) as snapshot:
                census = Census(
                    training,
                    snapshot,
                    seed=seed,
                    loss=lambda on_another: self._loss(call, on_another=on_another),
                )
                count = self._run_bare(call, parameters, census)
                trained = {id(parameter) for parameter in (*parameters, *frozen)}
                census.take(trained=trained, may_split=self._may_split)
                if is_whole:
                    self._note_means(call, seed=seed, trains=trains)
            # A loss may have thawed them at its end, as many a GAN's does.
            _freeze(frozen)
            wrapped = training.strategy.wrap(call, optimizer)
            self._changes_weights |= is_whole and census.has_weights
            self._run_twice(wrapped.call, parameters, seed=seed)
        return wrapped, count

    def renew(self, at: int) -> None:
        """Wraps a loss call anew, with what is trained now. Every rank calls it.

        Args: `at` its objective's place among the training's.
        Raises: DdpKitError on every rank, naming the parameter or layer.
        """
        training = self.training
        objective = training.objectives[at]

        def seed() -> None:
            seed_forward(objective.forward_key, 0, 0, device=training.group.device)

        for parameter in objective.parameters:
            parameter.grad = None
        with _only(objective.parameters, objective.frozen):
            objective.call = training.strategy.renew(objective.call)
            self._run_twice(objective.call, objective.parameters, seed=seed)

    def _run_twice(
        self, wrapped: nn.Module, parameters: Sequence[nn.Parameter], *, seed: Callable[[], None]
    ) -> None:
        """Runs as training does; the second time DDP's buckets are final.

        They are rebuilt after the first backward pass, and a later attempt of the run, which
        rebuilds them again, would otherwise sum in another order than the one it continues.
        """
        training = self.training
        has_attribute = training.forward_state.has_attribute
        for _ in range(2):
            with untouched(
                training.model, weights=self._changes_weights, has_attribute=has_attribute
            ):
                seed()
                self._run_wrapped(wrapped, parameters)

    def _loss(self, call: LossCall, *, on_another: bool) -> torch.Tensor:
        """Runs a loss forward, on the batch or another one of its shapes."""
        batch = self._batch.batch
        if on_another:
            batch = all_like_the_first(batch, self._batch.size)
        total: torch.Tensor = self.training.strategy.enter(call, batch)[0]
        return total

    def _run_bare(
        self, call: LossCall, parameters: Sequence[nn.Parameter], census: Census
    ) -> Count:
        """Runs the loss forward and backward once, unwrapped, and names what gets no gradient.

        Returns: how the loss's count will be known.
        """
        training = self.training
        batch = self._batch
        census.begin()
        with samples_named(batch, "before the first step"), census.watching():
            total, count, metrics = training.strategy.enter(call, batch.batch)
        require_pairs(metrics)
        self._check_count_beforehand(count)
        known = _count_of(count, batch.size, feed=self._feed, group=training.group)
        if not total.requires_grad:
            raise ConfigError(
                "the loss has no gradient: total must be computed from the model's output, "
                "without detach() or no_grad()."
            )
        census.after_forward(total)
        (total / batch.size).backward()
        census.after_backward()
        _refuse_unused(training, parameters, allows_unused=self._allows_unused)
        if any(parameter.grad is not None and parameter.grad.is_sparse for parameter in parameters):
            raise ConfigError(
                "the model has sparse gradients (an Embedding with sparse=True), which cannot be "
                "summed: leave sparse out."
            )
        # The wrapper's buckets take their memory.
        for parameter in parameters:
            parameter.grad = None
        return known

    def _note_means(self, call: LossCall, *, seed: Callable[[int], None], trains: str) -> None:
        """Notes what looks like a mean where a sum is meant, by a few samples more.

        It runs where each rank has the whole model: a loss that fails half way does no harm there.
        """

        def run(batch: Any, draws: int) -> Sums:
            seed(draws)
            total, count, metrics = call(batch)
            return {"loss": (total.detach(), count), **metrics}

        found = means_among(run, self._batch.batch, size=self._batch.size)
        what = f"the loss of {trains}" if trains else "the loss"
        notes = self.training.notes
        if "loss" in found:
            notes.append(note_of_loss(what))
            found.remove("loss")
        if found:
            notes.append(note_of_metrics(found, what=what))

    def _check_count_beforehand(self, count: int | torch.Tensor) -> None:
        count_of = self._feed.data.count
        beforehand = count if count_of is None else count_of(self._batch.batch)
        if not math.isclose(float(beforehand), float(count), rel_tol=TOLERANCE):
            raise ConfigError(
                f"Data(count=...) gives {float(beforehand):g} where the loss counts "
                f"{float(count):g}; they must agree."
            )

    def _run_wrapped(self, wrapped: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        for parameter in parameters:
            parameter.grad = None
        with self.training.strategy.micro_batch(wrapped, is_last=True):
            total, _, _ = wrapped(self._batch.batch)
            if not total.requires_grad:
                raise ConfigError(
                    "the loss has no gradient: all parameters that it uses are frozen in this "
                    "epoch by Recipe(frozen=...)."
                )
            (total / self._batch.size).backward()


@contextmanager
def _only(parameters: Sequence[nn.Parameter], frozen: Sequence[nn.Parameter]) -> Iterator[None]:
    """Lets gradients reach `parameters` alone, and drops them at the end."""
    _freeze(frozen)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.grad = None
        for parameter in frozen:
            parameter.requires_grad_(True)


def _freeze(parameters: Sequence[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.requires_grad_(False)


def _count_of(count: int | torch.Tensor, size: int, *, feed: Feed, group: Group) -> Count:
    """Returns how the loss's count will be known, from what it was for `size` samples."""
    is_fixed = not isinstance(count, torch.Tensor)
    if is_fixed and (count <= 0 or count % size) and feed.data.count is None:
        raise ConfigError(
            f"the loss's count is the int {count} for {size} samples. "
            "Return it as a tensor where it is not the same for each sample."
        )
    # Host-device synchronisation, once.
    whole = float(count) / size * feed.plan.global_batch
    exponent = 0
    if 0 < whole < math.inf:
        exponent = round(math.log2(whole))
    if feed.data.sharded:
        # The ranks' samples are not the same.
        exponent = max_over_ranks(group, [exponent])[0]
    found = [int(is_fixed), int(count) if is_fixed else 0, exponent]
    if first_difference(group, found) is not None:
        raise DdpKitError(
            "the ranks' losses return different counts for the same samples; "
            "the loss must not depend on the rank."
        )
    if feed.data.count is not None:
        return KnownCount(feed.data.count, group=group, slots=feed.plan.micro_batches)
    if is_fixed:
        return FixedCount(per_sample=int(count) // size, global_batch=feed.plan.global_batch)
    return FoundCount(expected=2.0**exponent, group=group, slots=feed.plan.micro_batches)


def _refuse_unused(
    training: Training, parameters: Sequence[nn.Parameter], *, allows_unused: bool
) -> None:
    names = {id(parameter): name for name, parameter in training.model.named_parameters()}
    unused = [names[id(parameter)] for parameter in parameters if parameter.grad is None]
    if first_difference(training.group, [len(unused)]) is not None:
        raise DdpKitError(
            f"rank {training.group.rank} finds {len(unused)} parameters without a gradient "
            "for the same samples, others another number."
        )
    if unused and training.group.world_size > 1 and not allows_unused:
        said = no_gradient(unused, is_split=training.strategy.shards is not None)
        raise ConfigError(
            f"{said}; if it never uses them, freeze them with requires_grad_(False) or remove them."
        )
