"""What a recipe says about a data set, and what kinds of data set there are.

Batch sizes, ranks and workers are not the data set's business, and not said here.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

from ddp_kit.data.indices import require_subsets, subset_indices
from ddp_kit.data.seeding import Draws
from ddp_kit.data.stream_length import length_of
from ddp_kit.errors import ConfigError, DataError

Order = Callable[[int, int, int], "NDArray[np.int64] | Sequence[int]"]


@dataclass(frozen=True)
class Data:
    """A data set and how it is read.

    A recipe may return a bare data set where nothing else is said.

    Args: `dataset` map-style, with `__getitems__`, or iterable; `collate(samples)` makes a batch of
        a list of samples (default: torch's); `augment(batch, draws)` changes a training batch,
        vectorised, from draws keyed by (seed, epoch, index, how often the sample came before in the
        epoch); `order(seed, epoch, size)` returns the indices of an epoch, a pure function
        (default: a permutation); `count(batch)` the loss's count where it varies but is known
        before the forward pass; `sharded` of a stream: it is each rank's own already, and a rank
        takes all of its samples from it. The numbers are then those of one number of ranks.

    An iterable data set is evaluated by at most one worker whatever `num_workers` is: each would
    read the whole stream.
    """

    dataset: Any
    collate: Callable[[list[Any]], Any] | None = None
    augment: Callable[[Any, Draws], Any] | None = None
    order: Order | None = None
    count: Callable[[Any], int] | None = None
    sharded: bool = False

    @property
    def is_iterable(self) -> bool:
        """Whether the samples can only be read one after another."""
        return isinstance(self.dataset, IterableDataset)

    @property
    def shared_length(self) -> int:
        """Samples in the data set, the same on all ranks; 0 if it is iterable and does not know, or
        is each rank's own."""
        if self.sharded:
            return 0
        return length_of(self.dataset) if self.is_iterable else len(self)

    def __len__(self) -> int:
        """Samples in the data set. Raises: DataError if an iterable one does not know."""
        try:
            return len(self.dataset)
        except TypeError:
            raise DataError(
                f"{type(self.dataset).__name__} has no length. "
                "Give it __len__, or limit the run by --max-steps alone."
            ) from None


def as_data(given: Any, *, what: str = "data") -> Data:
    """Returns what a recipe gave as `Data`.

    Args: `what` data it is, in words, for the error.
    Raises: DataError if it is no data set, or a Subset whose indices are none; ConfigError for
        `sharded` of what is no stream.
    """
    data = given if isinstance(given, Data) else Data(given)
    dataset = data.dataset
    has_items = hasattr(dataset, "__getitem__") or hasattr(dataset, "__getitems__")
    if not has_items and not isinstance(dataset, IterableDataset):
        raise DataError(
            f"the {what}: expected a data set with __getitem__ and __len__, or an "
            f"IterableDataset; got {type(dataset).__name__}."
        )
    if data.sharded and not data.is_iterable:
        raise ConfigError(
            f"the {what}: Data(sharded=True) is for a stream (an IterableDataset) that is each "
            "rank's own; of a data set with __getitem__ ddp_kit takes each rank's share. Leave it "
            "out, and what shares the data out."
        )
    try:
        require_subsets(dataset)
    except DataError as error:
        raise DataError(f"the {what}: {error}") from None
    return data


def as_evaluation_data(given: Any, *, what: str) -> Data:
    """Returns what a recipe gave to be evaluated as `Data`.

    Raises: ConfigError if it says what has no effect on such data; DataError as `as_data`.
    """
    data = as_data(given, what=what)
    for name in ("augment", "order", "count"):
        if getattr(data, name) is not None:
            raise ConfigError(
                f"Data({name}=...) has no effect on the {what}, which is read as it is, each "
                "sample once: leave it out."
            )
    return data


class BatchReader:
    """Reads a micro-batch from a data set whose `__getitems__` reads a batch at a time."""

    def __init__(self, dataset: Any):
        self._read = dataset.__getitems__
        self.takes_draws = "draws" in inspect.signature(self._read).parameters

    def __call__(self, indices: NDArray[np.int64], draws: Draws | None) -> Any:
        """Returns a list of samples, or a ready batch."""
        if self.takes_draws:
            return self._read(indices, draws=draws)
        return self._read(indices.tolist())


def without_subsets(dataset: Dataset[Any]) -> tuple[Any, NDArray[np.int64] | None]:
    """Returns the data set under nested `Subset`s and the indices into it; None for all of it.

    A Subset's own `__getitems__` would hide that the data set is read a sample at a time.
    """
    indices: NDArray[np.int64] | None = None
    while type(dataset) is Subset:
        own = subset_indices(dataset)
        indices = own if indices is None else own[indices]
        dataset = dataset.dataset
    return dataset, indices


def tensors_of(dataset: Any) -> tuple[torch.Tensor, ...] | None:
    """Returns the tensors of a plain TensorDataset, to be gathered at once; None for any other."""
    if type(dataset) is TensorDataset:
        return dataset.tensors
    return None
