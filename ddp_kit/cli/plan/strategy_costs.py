"""What each strategy makes of a model's size: one function a strategy.

A rank sends in a collective over W ranks, of n bytes each: 2 (W - 1) / W n in an all-reduce,
(W - 1) / W n in an all-gather and in a reduce-scatter, and as much on average in a broadcast.
Source: Thakur et al., Optimization of Collective Communication Operations in MPICH, 2005, sections
4 and 5. gloo makes its reduce-scatter of an all-reduce (seen on torch 2.15 by the kernel's count of
bytes sent).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ddp_kit.cli.plan.model_size import ModelSize
from ddp_kit.strategies.deepspeed.config import config_of

# DeepSpeed's defaults, in elements.
REDUCE_BUCKET_SIZE = 500_000_000
STAGE3_MAX_LIVE_PARAMETERS = 1_000_000_000


@dataclass(frozen=True, kw_only=True)
class RankBytes:
    """What the rank that holds most has under a strategy."""

    weights: int
    gradients: int
    moments: int  # the optimizer's state
    average: int  # the EMA of the weights
    sent: float  # in a step, on average
    gathered: int = 0  # of weights that are split: what of them is whole for a moment, at most
    is_offloaded: bool = False  # weights, gradients, moments and average are in host memory
    written_alone: int = 0  # of a checkpoint, what this rank writes since it alone has it
    written_by_owners: int = 0  # the same of all ranks; the rest is dealt out evenly


def ddp(size: ModelSize) -> RankBytes:
    """Everything is whole on each rank, and gradients are summed once a step."""
    return RankBytes(
        weights=size.weights,
        gradients=size.gradients,
        moments=size.optimizer.on_rank,
        average=size.weights,
        sent=_share_sent(size.ranks) * _summed(size),
    )


def zero1(size: ModelSize) -> RankBytes:
    """The optimizer's state is dealt out by whole parameters, which their owners send each step."""
    moments = max(size.optimizer.zero1_shares)
    sent_weights = _numel(size.trained) * size.weight_width
    return RankBytes(
        weights=size.weights,
        gradients=size.gradients,
        moments=moments,
        average=size.weights,
        sent=_share_sent(size.ranks) * (_summed(size) + sent_weights),
        written_alone=moments,
        written_by_owners=size.optimizer.whole,
    )


def fsdp(size: ModelSize) -> RankBytes:
    """Everything is split by rows, and weights are gathered piece by piece where they are used."""
    moments = size.optimizer.on_rank
    return RankBytes(
        weights=size.weights,
        gradients=size.gradients,
        moments=moments,
        average=size.weights,
        sent=_fsdp_sent(size),
        gathered=_fsdp_gathered(size),
        is_offloaded=size.settings.fsdp.cpu_offload,
        written_alone=size.weights * size.weight_copies + moments,
        written_by_owners=size.checkpoint - size.saved_buffers,
    )


def deepspeed(size: ModelSize) -> RankBytes:
    """Each stage splits more: 1 the optimizer's state, 2 gradients, 3 weights.

    From stage 1 on the optimizer steps a copy of a rank's part of the weights.
    """
    stage = size.settings.deepspeed.stage
    weights = size.weights
    gradients = size.gradients
    moments = size.optimizer.on_rank
    if stage == 3:
        weights = weights // size.ranks
    average = weights
    if stage:
        weights += gradients // size.ranks
        gradients = gradients // size.ranks
        moments = moments // size.ranks
    return RankBytes(
        weights=weights,
        gradients=gradients,
        moments=moments,
        average=average,
        sent=_deepspeed_sent(size),
        gathered=_deepspeed_gathered(size),
    )


def _share_sent(ranks: int) -> float:
    """Of what a rank gathers or scatters, the share that it sends."""
    return (ranks - 1) / ranks


def _numel(parameters: Sequence[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _summed(size: ModelSize) -> int:
    """Returns the bytes that an all-reduce of the gradients moves."""
    width = size.weight_width
    if size.settings.comm != "fp32":
        width = 2
    return 2 * _numel(size.trained) * width


def _scatters(size: ModelSize) -> int:
    """Returns how often a reduce-scatter moves its bytes."""
    return 2 if size.backend == "gloo" else 1


def _fsdp_gathered(size: ModelSize) -> int:
    """Returns the bytes that are whole for a moment: of weights, and of gradients not yet split.

    These weights are the root's and two more pieces, one in use and one on its way.
    """
    *others, root = [_numel(piece) for piece in size.pieces]
    gradients = max([root, *others])
    # Gradients stay whole on each rank until the last micro-batch.
    if size.passes > 1:
        gradients = sum([root, *others])
    weights = root + 2 * max(others, default=0)
    return weights * size.gathered_width + gradients * size.weight_width


def _fsdp_sent(size: ModelSize) -> float:
    """Returns what a rank sends to its line of ranks, and with `--fsdp.hybrid` to other lines."""
    line = size.ranks
    if size.settings.fsdp.hybrid:
        line = size.ranks_per_node
    *others, root = [_padded(piece, line) for piece in size.pieces]
    trained: list[nn.Parameter] = []
    for piece in size.pieces:
        trained += [parameter for parameter in piece if parameter.requires_grad]
    summed = _padded(trained, line) * size.weight_width
    # The root stays whole from forward to backward.
    gathers = size.passes * (root + 2 * sum(others)) * size.gathered_width
    within = _share_sent(line) * (gathers + summed * _scatters(size))
    lines = size.ranks // line
    return within + 2 * (lines - 1) / lines * summed / line


def _padded(parameters: Sequence[nn.Parameter], line: int) -> int:
    """Returns the number of weights once each rank of a line has as many rows of a parameter."""
    total = 0
    for parameter in parameters:
        rows = parameter.shape[0]
        in_a_row = parameter.numel() // max(1, rows)
        total += -(-rows // line) * in_a_row
    return total * line


def _deepspeed_limit(size: ModelSize, key: str, default: int) -> int:
    """Returns one of DeepSpeed's limits in bytes."""
    zero = config_of(size.settings.deepspeed)["zero_optimization"]
    return int(zero.get(key, default)) * size.weight_width


def _max_live(size: ModelSize) -> int:
    return _deepspeed_limit(size, "stage3_max_live_parameters", STAGE3_MAX_LIVE_PARAMETERS)


def _deepspeed_gathered(size: ModelSize) -> int:
    stage = size.settings.deepspeed.stage
    if stage == 0:
        return 0
    if stage == 1:
        return size.gradients
    bucket = _deepspeed_limit(size, "reduce_bucket_size", REDUCE_BUCKET_SIZE)
    gradients = min(size.gradients, 2 * bucket)
    if stage == 2:
        return gradients
    return min(size.weights, _max_live(size)) + gradients


def _deepspeed_sent(size: ModelSize) -> float:
    stage = size.settings.deepspeed.stage
    share = _share_sent(size.ranks)
    summed = _summed(size)
    trained = _numel(size.trained) * size.weight_width
    if stage == 0:
        return share * summed
    # Seen: stages 1 and 2 sum gradients with an all-reduce, as stage 0 does.
    if stage == 1:
        return share * (summed + trained)
    if stage == 2:
        return share * (size.passes * summed + trained)
    gathers = sum(_numel(piece) for piece in size.pieces) * size.weight_width
    # Where not all may stay whole from forward to backward, they are gathered again.
    if gathers > _max_live(size):
        gathers *= 2
    return share * (size.passes * (gathers + trained * _scatters(size)))
