"""Steps that are not finite."""

from collections.abc import Callable
from typing import Any

import torch
from cases import vectors
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from ddp_kit import LossSum
from ddp_kit.data.seeding import permutation


def with_bad_sample(position: int) -> TensorDataset:
    """Returns data in which one sample, at `position` of the first epoch, has a label that stands for a bad sample."""
    inputs, labels = vectors().tensors
    labels = labels.clone()
    labels[permutation(0, 0, 240)[position]] = 9
    return TensorDataset(inputs, labels)


def inf_at_9(model: nn.Module, batch: Any) -> LossSum:
    """The loss is inf where a bad sample is, and its gradient is finite."""
    inputs, labels = batch
    losses = cross_entropy(model(inputs), labels % 9, reduction="none") + torch.where(
        labels == 9, torch.inf, 0.0
    )
    return LossSum(losses.sum(), len(labels))


def fused(name: str) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """Returns an optimizer that decides on the device whether a step is applied, as on CUDA."""
    kinds: dict[str, Any] = {"SGD": torch.optim.SGD, "AdamW": torch.optim.AdamW}
    return lambda model: kinds[name](model.parameters(), lr=0.1, fused=True)
