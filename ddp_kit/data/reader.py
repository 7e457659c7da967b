"""From sample indices to a batch: the one piece of code that touches a user's data set.

Owns: the seeding around it, collating and augmenting. It is the same in the training process and in a loader worker.
Refuses: knowing ranks. What it returns depends on the seed, the epoch and the indices.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import default_collate

from ddp_kit.data.dataset import BatchReader, Data, tensors_of, without_subsets
from ddp_kit.data.keyed_generators import KeyedGenerators
from ddp_kit.data.seeding import Draws, Purpose, key, sample_keys

EVALUATION_EPOCH = -1  # in the keys of evaluation's draws: each evaluation has the same ones


class Request(NamedTuple):
    """A micro-batch to read: its place in the run and its samples (positions in the stream for an iterable data set)."""

    step: int
    epoch: int
    micro_batch: int  # index in the global batch
    indices: NDArray[np.int64]
    is_padding: bool = False  # evaluation: read so that all ranks run the same number of forward passes; counts nothing
    occurrences: NDArray[np.int64] | None = (
        None  # how often each sample came before in its epoch; None: never
    )


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

    def __init__(self, data: Data, *, seed: int, training: bool):
        self._data, self._seed, self._training = data, seed, training
        self._dataset, self._subset = without_subsets(data.dataset)
        self._tensors = tensors_of(self._dataset) if data.collate is None else None
        self._by_batch = (
            BatchReader(self._dataset) if hasattr(self._dataset, "__getitems__") else None
        )
        self._collate = data.collate or default_collate
        self._augment = data.augment if training else None
        self._generators = KeyedGenerators()

    @property
    def _may_draw(self) -> bool:
        """Whether code runs that may draw from default generators: that of a data set which is given draws does not."""
        if self._augment is not None or self._data.collate is not None:
            return True
        return self._tensors is None and not (
            self._by_batch is not None and self._by_batch.takes_draws
        )

    def __getitems__(
        self, request: Request
    ) -> MicroBatch:  # torch's fetcher hands a batch sampler's item to this method
        """Returns the micro-batch of a request, in a loader worker."""
        self._generators.install_once()
        return self._answer(request)

    def read(self, requests: Sequence[Request]) -> list[MicroBatch]:
        """Returns the micro-batches of requests, in the training process, whose generators are put back once for all of them."""
        if not self._may_draw:
            return [self._answer(request) for request in requests]
        with self._generators.installed():
            return [self._answer(request) for request in requests]

    def _answer(self, request: Request) -> MicroBatch:
        batch = self._batch(request)
        while self._may_draw and self._generators.have_moved():
            batch = self._batch(request)  # again, now seeded
        return MicroBatch(request, batch)

    def _batch(self, request: Request) -> Any:
        batch = self._read(request)
        if self._augment is None:
            return batch
        self._seed_for_batch(
            request
        )  # an augmentation should use the draws; one that uses default generators is reproducible too
        return self._augment(batch, self._draws(request))

    def _read(self, request: Request) -> Any:
        indices = request.indices if self._subset is None else self._subset[request.indices]
        if self._tensors is not None:
            at = torch.from_numpy(indices)
            return tuple(tensor.index_select(0, at) for tensor in self._tensors)
        if self._by_batch is None:
            return self._collate(self._samples(request, indices))
        draws = self._draws(request) if self._training and self._by_batch.takes_draws else None
        self._seed_for_batch(request)
        answer = self._by_batch(indices, draws)
        return self._collate(answer) if isinstance(answer, list) else answer

    def _samples(self, request: Request, indices: NDArray[np.int64]) -> list[Any]:
        dataset = self._dataset
        if not self._generators.are_seeded:
            return [dataset[index] for index in indices.tolist()]
        keys = sample_keys(self._seed, self._epoch(request), request.indices, request.occurrences)
        samples = []
        for index, value in zip(indices.tolist(), keys.tolist(), strict=True):
            self._generators.seed(value)
            samples.append(dataset[index])
        return samples

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
