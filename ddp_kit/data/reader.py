"""From sample indices to a batch: the one piece of code that touches a user's data set.

Owns: the seeding around it, collating and augmenting. It is the same in the training process and in a loader worker.
Refuses: knowing ranks. What it returns depends on the seed, the epoch and the indices.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import default_collate

from ddp_kit.data.data import BatchReader, Data, tensors_of, without_subsets
from ddp_kit.seeding import Draws, Purpose, generators_put_back, key, seed_generators


class Request(NamedTuple):
    """A micro-batch to read: its place in the run and its samples (positions in the stream for an iterable data set)."""

    step: int
    epoch: int
    micro_batch: int  # index in the global batch
    indices: NDArray[np.int64]
    is_padding: bool = False  # evaluation: read so that all ranks run the same number of forward passes; counts nothing


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
        self._tensors = tensors_of(self._dataset)
        self._by_batch = BatchReader(self._dataset) if hasattr(self._dataset, "__getitems__") else None
        self._collate = data.collate or default_collate

    def __getitems__(self, request: Request) -> MicroBatch:  # torch's fetcher hands a batch sampler's item to this method
        """Returns the micro-batch of a request."""
        return self.read(request)

    def read(self, request: Request) -> MicroBatch:
        """Returns the micro-batch of a request."""
        batch = self._read(request)
        if self._training and self._data.augment is not None:
            with generators_put_back():  # an augmentation should use the draws; one that uses default generators is reproducible too
                seed_generators(key(self._seed, Purpose.BATCH, request.epoch, int(request.indices[0])))
                batch = self._data.augment(batch, Draws(self._seed, request.epoch, request.indices))
        return MicroBatch(request, batch)

    def _read(self, request: Request) -> Any:
        indices = request.indices if self._subset is None else self._subset[request.indices]
        if self._tensors is not None and self._data.collate is None:
            at = torch.from_numpy(indices)
            return tuple(tensor.index_select(0, at) for tensor in self._tensors)
        if self._by_batch is not None and self._by_batch.takes_draws:
            draws = Draws(self._seed, request.epoch, request.indices) if self._training else None
            return self._collated(self._by_batch(indices, draws))
        epoch = request.epoch if self._training else -1
        with generators_put_back():
            if self._by_batch is not None:
                seed_generators(key(self._seed, Purpose.BATCH, epoch, int(request.indices[0])))
                return self._collated(self._by_batch(indices, None))
            samples = []
            for own, index in zip(request.indices.tolist(), indices.tolist(), strict=True):
                seed_generators(key(self._seed, Purpose.SAMPLE, epoch, own))
                samples.append(self._dataset[index])
            return self._collate(samples)

    def _collated(self, answer: Any) -> Any:
        return self._collate(answer) if isinstance(answer, list) else answer
