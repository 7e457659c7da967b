"""From sample indices to a batch: the one piece of code that touches a user's data set.

It seeds the default generators around it, collates and augments, in the same way in the training
process and in a loader worker. It knows no ranks: what it returns depends on the seed, the epoch
and the indices.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import default_collate

from ddp_kit.data.dataset import BatchReader, Data, tensors_of, without_subsets
from ddp_kit.data.keyed_generators import KeyedGenerators
from ddp_kit.data.odd_samples import collated, require_as_many, sample_named
from ddp_kit.data.seeding import Draws, Purpose, key, sample_keys

# In the keys of evaluation's draws: each evaluation has the same ones.
EVALUATION_EPOCH = -1


class Request(NamedTuple):
    """A micro-batch to read: its place in the run and its samples.

    `micro_batch` is the index in the global batch; `indices` are positions in the stream for an
    iterable data set. `is_padding`: in an evaluation, read so that all ranks run the same number of
    forward passes; it counts nothing. `occurrences`: how often each sample came before in its
    epoch; None: never.
    """

    step: int
    epoch: int
    micro_batch: int
    indices: NDArray[np.int64]
    is_padding: bool = False
    occurrences: NDArray[np.int64] | None = None


class MicroBatch(NamedTuple):
    """A request and the batch that answers it."""

    request: Request
    batch: Any

    @property
    def size(self) -> int:
        """Samples in it."""
        return len(self.request.indices)


class Reader:
    """Answers requests from a map-style data set. `training` switches augmentation on."""

    def __init__(self, data: Data, *, seed: int, training: bool, what: str = "training data"):
        """Args: `what` data it is, in words, for errors."""
        self._what = what
        self._seed = seed
        self._training = training
        self._dataset, self._subset = without_subsets(data.dataset)
        self._tensors: tuple[torch.Tensor, ...] | None = None
        if data.collate is None:
            self._tensors = tensors_of(self._dataset)
        self._by_batch: BatchReader | None = None
        if hasattr(self._dataset, "__getitems__"):
            self._by_batch = BatchReader(self._dataset)
        self._collate = data.collate or default_collate
        self._augment = data.augment if training else None
        self._generators = KeyedGenerators()
        # In a loader worker: where to note the sample that is being read.
        self.notes: NDArray[np.int64] | None = None
        # Whether code runs that may draw from default generators: that of a data set which is given
        # draws does not.
        takes_draws = self._by_batch is not None and self._by_batch.takes_draws
        self._may_draw = (
            self._augment is not None
            or data.collate is not None
            or (self._tensors is None and not takes_draws)
        )

    def __getitems__(self, request: Request) -> MicroBatch:
        """Returns the micro-batch of a request, in a loader worker.

        torch's fetcher hands a batch sampler's item to this method.
        """
        self._generators.install_once()
        return self._answer(request)

    def read(self, requests: Sequence[Request]) -> list[MicroBatch]:
        """Returns the micro-batches of requests, in the training process.

        Its generators are put back once for all of them.
        """
        if not self._may_draw:
            return [self._answer(request) for request in requests]
        with self._generators.installed():
            return [self._answer(request) for request in requests]

    def _answer(self, request: Request) -> MicroBatch:
        batch = self._batch(request)
        while self._may_draw and self._generators.have_moved():
            # Again, now seeded.
            batch = self._batch(request)
        return MicroBatch(request, batch)

    def _batch(self, request: Request) -> Any:
        batch = self._read(request)
        if self._augment is None:
            return batch
        # An augmentation should use the draws; one that uses default generators is reproducible
        # too.
        self._seed_for_batch(request)
        return self._augment(batch, self._draws(request))

    def _read(self, request: Request) -> Any:
        indices = request.indices if self._subset is None else self._subset[request.indices]
        if self._tensors is not None:
            at = torch.from_numpy(indices)
            return tuple(tensor.index_select(0, at) for tensor in self._tensors)
        if self._by_batch is None:
            return self._collated(request, self._samples(request, indices))
        if self.notes is not None:
            self.notes[0] = indices[0]
        draws = None
        if self._training and self._by_batch.takes_draws:
            draws = self._draws(request)
        self._seed_for_batch(request)
        answer = self._by_batch(indices, draws)
        require_as_many(answer, len(indices), what=self._what)
        return self._collated(request, answer) if isinstance(answer, list) else answer

    def _collated(self, request: Request, samples: list[Any]) -> Any:
        below = None if self._subset is None else self._subset[request.indices]
        return collated(
            samples, self._collate, indices=request.indices, below=below, what=self._what
        )

    def _samples(self, request: Request, indices: NDArray[np.int64]) -> list[Any]:
        samples: list[Any] = []
        try:
            self._read_into(samples, request, indices)
        except Exception as error:
            named = sample_named(len(samples), indices=request.indices)
            error.add_note(f"while reading {named} of the {self._what}")
            raise
        return samples

    def _read_into(self, samples: list[Any], request: Request, indices: NDArray[np.int64]) -> None:
        dataset = self._dataset
        if not self._generators.are_seeded:
            for index in indices.tolist():
                if self.notes is not None:
                    self.notes[0] = index
                samples.append(dataset[index])
            return
        keys = sample_keys(self._seed, self._epoch(request), request.indices, request.occurrences)
        for index, value in zip(indices.tolist(), keys.tolist(), strict=True):
            self._generators.seed(value)
            if self.notes is not None:
                self.notes[0] = index
            samples.append(dataset[index])

    def _seed_for_batch(self, request: Request) -> None:
        if not self._generators.are_seeded:
            return
        parts = [self._epoch(request), int(request.indices[0])]
        if request.occurrences is not None and request.occurrences[0]:
            parts.append(int(request.occurrences[0]))
        self._generators.seed(key(self._seed, Purpose.BATCH, *parts))

    def _epoch(self, request: Request) -> int:
        return request.epoch if self._training else EVALUATION_EPOCH

    def _draws(self, request: Request) -> Draws:
        return Draws(self._seed, request.epoch, request.indices, occurrences=request.occurrences)
