"""How a global batch is split over ranks and micro-batches.

It is arithmetic only, the same on every rank. The global batch itself is never changed: it is the
experiment, and ranks and accumulation only split it. There are two rules, both balanced:

* `micro_batch` divides `global_batch` and there are at least as many micro-batches as ranks: the
  micro-batches are the same at any world size and are dealt out whole, in order. This is what keeps
  BatchNorm and dropout the same at any world size.
* otherwise each rank takes an even share and cuts it evenly.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ddp_kit.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """The cuts of a global batch, and who takes which piece.

    Micro-batch i is `bounds[i]:bounds[i + 1]` inside the global batch; rank r runs the
    micro-batches `firsts[r]:firsts[r + 1]`, in order.
    """

    global_batch: int
    bounds: tuple[int, ...]
    firsts: tuple[int, ...]
    # The same micro-batches at any world size up to their number.
    is_invariant: bool
    # The size of a micro-batch that was asked for.
    stated: int = 0

    @property
    def micro_batches(self) -> int:
        """Micro-batches in a global batch, over all ranks."""
        return len(self.bounds) - 1

    @property
    def largest(self) -> int:
        """Samples in the largest micro-batch."""
        return max(stop - start for start, stop in pairwise(self.bounds))

    def of_rank(self, rank: int) -> list[tuple[int, int, int]]:
        """Returns (index in the global batch, first sample, end) of each micro-batch of a rank."""
        own = range(self.firsts[rank], self.firsts[rank + 1])
        return [(i, self.bounds[i], self.bounds[i + 1]) for i in own]


def plan_batches(global_batch: int, *, micro_batch: int, world_size: int) -> BatchPlan:
    """Splits a global batch over ranks and micro-batches.

    Args: `global_batch` samples per optimizer step over all ranks; `micro_batch` the most samples
        of one forward pass, 0 for a rank's whole share; `world_size` ranks.
    Raises: ConfigError if a size is not positive or there are more ranks than samples.
    """
    _check_sizes(global_batch, micro_batch=micro_batch, world_size=world_size)
    divides = micro_batch > 0 and global_batch % micro_batch == 0
    if divides and global_batch // micro_batch >= world_size:
        return _whole_micro_batches(global_batch, micro_batch=micro_batch, world_size=world_size)
    return _even_shares(global_batch, micro_batch=micro_batch, world_size=world_size)


def _check_sizes(global_batch: int, *, micro_batch: int, world_size: int) -> None:
    faults = []
    if global_batch < 1:
        faults.append(
            f"--global-batch {global_batch}: expected at least 1 sample per optimizer step"
        )
    if micro_batch < 0:
        faults.append(
            f"--micro-batch {micro_batch}: expected at least 1 sample, "
            "or 0 for a rank's whole share"
        )
    if not faults and global_batch < world_size:
        faults.append(
            f"--global-batch {global_batch} has fewer samples than there are ranks ({world_size}). "
            f"Type --global-batch {world_size} or more, or start at most {global_batch} ranks"
        )
    if faults:
        raise ConfigError(". ".join(faults) + ".")


def _whole_micro_batches(global_batch: int, *, micro_batch: int, world_size: int) -> BatchPlan:
    """The first rule: equal micro-batches, dealt out whole."""
    return BatchPlan(
        global_batch=global_batch,
        bounds=tuple(range(0, global_batch + 1, micro_batch)),
        firsts=tuple(_cut(global_batch // micro_batch, parts=world_size)),
        is_invariant=True,
        stated=micro_batch,
    )


def _even_shares(global_batch: int, *, micro_batch: int, world_size: int) -> BatchPlan:
    """The second rule: an even share for each rank, each cut into as many even pieces."""
    largest_share = -(-global_batch // world_size)
    pieces = 1
    if micro_batch:
        pieces = -(-largest_share // micro_batch)
    cuts = _cut(global_batch, parts=world_size)
    bounds = [0]
    firsts = [0]
    for start, stop in pairwise(cuts):
        share = stop - start
        bounds += [start + cut for cut in _cut(share, parts=min(pieces, share))[1:]]
        firsts.append(len(bounds) - 1)
    return BatchPlan(
        global_batch=global_batch,
        bounds=tuple(bounds),
        firsts=tuple(firsts),
        is_invariant=False,
        stated=micro_batch,
    )


def _cut(size: int, *, parts: int) -> list[int]:
    """Returns parts + 1 boundaries that cut `size` into even pieces, the larger ones first."""
    small, larger = divmod(size, parts)
    return [i * small + min(i, larger) for i in range(parts + 1)]


def describe(plan: BatchPlan) -> str:
    """Returns the split in one line, as it is printed at start.

    For instance `512 global = 2 ranks x 128 micro-batch x 2 accumulation`.
    """
    world_size = len(plan.firsts) - 1
    of_ranks = [plan.of_rank(rank) for rank in range(world_size)]
    sizes = sorted({stop - start for start, stop in pairwise(plan.bounds)}, reverse=True)
    accumulations = {len(own) for own in of_ranks}
    if len(sizes) == 1 and len(accumulations) == 1:
        ranks = "1 rank" if world_size == 1 else f"{world_size} ranks"
        return (
            f"{plan.global_batch} global = {ranks} x {sizes[0]} micro-batch "
            f"x {len(of_ranks[0])} accumulation"
        )
    shares = [own[-1][2] - own[0][1] for own in of_ranks]
    return (
        f"{plan.global_batch} global = {_sum(shares)}, "
        f"in micro-batches of {' or '.join(map(str, sizes))}"
    )


def _sum(shares: Sequence[int]) -> str:
    if len(shares) <= 8:
        return " + ".join(map(str, shares))
    counts = {share: shares.count(share) for share in dict.fromkeys(shares)}
    return " + ".join(f"{count} x {share}" for share, count in counts.items())


def splits_that_keep(global_batch: int, *, world_size: int) -> int:
    """Returns the largest micro-batch of which a global batch has at least `world_size`."""
    sizes = range(1, global_batch // world_size + 1)
    return max(size for size in sizes if global_batch % size == 0)


def fitting_world_sizes(micro_batches: int) -> list[int]:
    """Returns the numbers of ranks that hold whole subtrees of the tree over the micro-batches.

    That is a power of two of micro-batches on each rank, or all of them on one.
    """
    divisors = [ranks for ranks in range(1, micro_batches + 1) if micro_batches % ranks == 0]
    return [ranks for ranks in divisors if ranks == 1 or (micro_batches // ranks).bit_count() == 1]


def require_subtrees(plan: BatchPlan, *, world_size: int) -> None:
    """Raises: ConfigError if some of the ranks would not hold whole subtrees."""
    whole = plan.global_batch
    micro = plan.stated or plan.global_batch
    fitting = []
    if whole % micro == 0:
        fitting = fitting_world_sizes(whole // micro)
    if world_size not in fitting:
        raise ConfigError(
            f"--exact: {whole} / {micro} = {whole // micro} micro-batches do not fit "
            f"{world_size} ranks. World sizes that fit: {', '.join(map(str, fitting))}."
        )
