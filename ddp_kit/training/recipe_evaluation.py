"""What a recipe evaluates, and how: its sets, one pass over each, and the trial before training.

Several sets report under names of their own, the averaged weights are in the model for the time of
a pass, and the recipe's `samples` are drawn here. When that is done is said in `loop`.
"""

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from ddp_kit.data.agreement import require_own_samples, require_same_samples
from ddp_kit.data.dataset import Data
from ddp_kit.data.loader import evaluation_batches, first_of_evaluation
from ddp_kit.data.seeding import forward_key, seed_forward
from ddp_kit.data.stream_checks import require_beginning_again
from ddp_kit.data.transfer import Placement
from ddp_kit.distributed.collectives import gather_bytes
from ddp_kit.distributed.local_shard import is_split
from ddp_kit.distributed.process_group import Group
from ddp_kit.errors import ConfigError, DataError, nearest
from ddp_kit.metrics import Sums
from ddp_kit.model_state.untouched import Changes, Snapshot, untouched
from ddp_kit.recipe import Recipe
from ddp_kit.settings import Settings
from ddp_kit.strategies.precision import autocast
from ddp_kit.training.answers import Answer
from ddp_kit.training.ema import WeightAverage
from ddp_kit.training.evaluation import EVALUATION, bare, evaluate, evaluating, measure_of
from ddp_kit.training.evaluation_sets import named
from ddp_kit.training.growth import means_among, note_of_metrics, size_of
from ddp_kit.training.state import Training


@dataclass(kw_only=True)
class Evaluator:
    """The recipe's evaluation sets and how they are measured.

    `sets` is {"": data} for one, {"name/": data} for several.
    """

    recipe: Recipe
    settings: Settings
    group: Group
    sets: Mapping[str, Data]
    micro_batch: int
    placement: Placement
    # What data the sets are, in words.
    what: str = "evaluation data"
    # The strategy's way to call a function that uses the model.
    enter: Callable[..., Any] = bare
    # What an evaluation will report, known from one micro-batch.
    names: dict[str, float] = field(default_factory=dict)
    # What the user should read at start.
    notes: list[str] = field(default_factory=list)
    # Which attributes are the model's own.
    has_attribute: Callable[[str], bool] = field(default=lambda name: True)
    # What an evaluation changes of the model, by name; it is put back.
    changed: set[str] = field(default_factory=set)

    def __call__(
        self,
        model: nn.Module,
        *,
        average: WeightAverage | None = None,
        limit: int | None = None,
        summarizes: bool = False,
        heed: Callable[[], None] | None = None,
    ) -> dict[str, float]:
        """Returns the metrics of all sets, of the averaged weights where there are some.

        Every rank calls it.

        Args:
            limit: micro-batches of each set: a trial, which leaves `summarize` out unless
                `summarizes`.
            heed: called after each micro-batch; may raise.
        """
        summarize = None
        if limit is None or summarizes:
            summarize = self.recipe.summarize
        metrics: dict[str, float] = {}
        with _applied(average), self._put_back(model) as rewind:
            for prefix, data in self.sets.items():
                with closing(self._batches(prefix, data)) as batches:
                    found = evaluate(
                        model,
                        itertools.islice(batches, limit),
                        group=self.group,
                        measure=measure_of(self.recipe),
                        summarize=summarize,
                        precision=self.settings.precision,
                        seed=self.settings.seed,
                        heed=heed,
                        enter=self.enter,
                        rewind=rewind,
                    )
                metrics |= {prefix + name: value for name, value in found.items()}
        return metrics

    @contextmanager
    def _put_back(self, model: nn.Module) -> Iterator[Callable[[], None] | None]:
        """Puts back at the end what evaluations were seen to change. Yields what does it before: a
        micro-batch of an evaluation depends on none before it, for another rank may have run that.
        """
        if not self.changed:
            yield None
            return
        snapshot = Snapshot(
            model,
            has=lambda place: place.name in self.changed,
            has_attribute=lambda name: name in self.changed,
            # It is made before the model is set to evaluate.
            has_modes=False,
        )
        try:
            yield snapshot.put_back
        finally:
            snapshot.put_back()

    def on(self, sets: Mapping[str, Data], *, what: str = "test data") -> "Evaluator":
        """Returns an evaluator of other data sets, measured in the same way."""
        return replace(self, sets=sets, what=what)

    def weights(self, training: Training) -> AbstractContextManager[None]:
        """Puts the weights that evaluation uses into the model: the average where there is one."""
        return _applied(training.average)

    def samples(self, model: nn.Module) -> Mapping[str, Any]:
        """Calls the recipe's `samples` on this rank."""
        assert self.recipe.samples is not None
        with evaluating(model), self._put_back(model):
            seed_forward(forward_key(self.settings.seed), EVALUATION, 0, device=self.group.device)
            found: Mapping[str, Any] = self.enter(self.recipe.samples, model)
            return found

    def _batches(self, prefix: str, data: Data) -> Any:
        return evaluation_batches(
            data,
            what=named(self.what, prefix),
            group=self.group,
            micro_batch=self.micro_batch,
            placement=self.placement,
            num_workers=self.settings.num_workers,
        )

    def dry_run(self, model: nn.Module) -> None:
        """Runs one micro-batch of each set: a wrong metric name or too little memory shows now, not
        hours later. Every rank calls it.

        Raises:
            DataError: a stream gives ranks other samples, or there is nothing to count.
            ConfigError: early stopping watches a metric that evaluation does not produce.
        """
        self.compare_sets()
        caught: list[Any] = []
        with self.trial(model):
            self.names = self._catching(caught)(model, limit=1)
        self._note_means(model, caught)
        if self._needs_summary() and self.recipe.summarize is not None and self.sets:
            self.names = self(model, limit=1, summarizes=True)
        if self.sets and not self.names:
            raise DataError(
                "evaluation counted nothing: the evaluation data is empty, or `evaluate` "
                "returned nothing."
            )
        self._require_watched()

    @contextmanager
    def trial(self, model: nn.Module) -> Iterator[None]:
        """Around one micro-batch of each set: sees what an evaluation changes of the model, and
        puts it back. Every rank calls it.
        """
        is_whole = not any(is_split(parameter) for parameter in model.parameters())
        with untouched(model, weights=is_whole, has_attribute=self.has_attribute) as snapshot:
            yield
            self.changed = self._of_all_ranks(snapshot.changes())

    def _of_all_ranks(self, changes: Changes) -> set[str]:
        """Returns the names of what a trial has changed on any rank: each has run samples of its
        own."""
        own = [place.name for place in changes.places]
        own += [attribute.name for attribute in (*changes.plain, *changes.other)]
        names: set[str] = set()
        for row in gather_bytes(self.group, json.dumps(own).encode()):
            names.update(json.loads(row))
        return names

    def _catching(self, caught: list[Any]) -> "Evaluator":
        """Returns an evaluator that also notes the batches that the recipe's `evaluate` gets."""
        measure = self.recipe.evaluate
        if measure is None:
            return self

        def catching(model: Any, batch: Any) -> Any:
            caught.append(batch)
            return measure(model, batch)

        return replace(self, recipe=replace(self.recipe, evaluate=catching))

    def _note_means(self, model: nn.Module, batches: Sequence[Any]) -> None:
        """Notes what looks like a mean where a sum is meant, where each rank has the whole
        model."""
        measure = self.recipe.evaluate
        if measure is None or self.settings.strategy not in ("ddp", "zero1"):
            return

        def run(batch: Any, draws: int) -> Sums:
            seed_forward(forward_key(self.settings.seed), draws, 0, device=self.group.device)
            return Answer(measure(model, batch), size=size_of(batch)).sums

        found: set[str] = set()
        for batch in batches:
            with (
                evaluating(model),
                autocast(self.settings.precision, self.group.device),
                untouched(model, weights=False, has_attribute=self.has_attribute),
                self._put_back(model),
            ):
                found.update(means_among(run, batch, size=size_of(batch)))
        if found:
            self.notes.append(note_of_metrics(sorted(found), what="evaluate"))

    def compare_sets(self) -> None:
        """Compares the first samples of each set over ranks. Every rank calls it.

        Raises: DataError if ranks have others, or if a stream does not begin again, for each
            evaluation reads it anew.
        """
        for prefix, data in self.sets.items():
            if not data.is_iterable and self.group.world_size == 1:
                continue
            what = named(self.what, prefix)
            first = self._first_batch(data, what=what)
            if data.is_iterable:
                require_beginning_again(first, self._first_batch(data, what=what), what=what)
            if data.sharded:
                require_own_samples(self.group, first, what=what)
                continue
            require_same_samples(self.group, first, what=what, is_iterable=data.is_iterable)

    def _first_batch(self, data: Data, *, what: str) -> Any:
        first = first_of_evaluation(
            data,
            micro_batch=self.micro_batch,
            num_workers=self.settings.num_workers,
            what=what,
        )
        return first.batch if first is not None else None

    def _needs_summary(self) -> bool:
        """Whether the recipe's `summarize` must run to know the names: rows alone have no metrics
        without it."""
        metric = self.settings.early_stop.metric
        return not self.names or bool(metric and metric not in self.names)

    def _require_watched(self) -> None:
        """Raises: ConfigError if early stopping watches a metric that is not there."""
        metric = self.settings.early_stop.metric
        if not metric or metric in self.names:
            return
        has = "the recipe has no eval_data"
        if self.names:
            has = f"it produces {', '.join(self.names)}"
        near = nearest(metric, self.names)
        hint = f" Did you mean {near}?" if near else ""
        raise ConfigError(
            f"--early-stop.metric {metric}: evaluation does not produce it; {has}.{hint}"
        )


def _applied(average: WeightAverage | None) -> AbstractContextManager[None]:
    """Puts the averaged weights into the model, where there are some."""
    return average.applied() if average is not None else nullcontext()
