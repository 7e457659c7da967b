"""How a global batch is split over ranks and micro-batches: arithmetic only, the same on every rank.

Owns: boundaries of the micro-batches inside a global batch, who takes which, and the line that says so.
Refuses: changing the global batch. It is the experiment; ranks and accumulation only split it.

Two rules, both balanced:
* `micro_batch` divides `global_batch` and there are at least as many micro-batches as ranks: the micro-batches are the same
  at any world size and are dealt out whole, in order. This is what keeps BatchNorm and dropout the same at any world size.
* otherwise each rank takes an even share and cuts it evenly.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ddp_kit.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """`bounds[i]:bounds[i + 1]` is micro-batch i inside the global batch; rank r runs `firsts[r]:firsts[r + 1]`, in order."""

    global_batch: int
    bounds: tuple[int, ...]
    firsts: tuple[int, ...]
    is_invariant: bool  # the same micro-batches at any world size up to their number
    stated: int = 0  # the size of a micro-batch that was asked for

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
        return [
            (i, self.bounds[i], self.bounds[i + 1])
            for i in range(self.firsts[rank], self.firsts[rank + 1])
        ]


def plan_batches(global_batch: int, *, micro_batch: int, world_size: int) -> BatchPlan:
    """Splits a global batch over ranks and micro-batches.

    Args: `global_batch` samples per optimizer step over all ranks; `micro_batch` the most samples of one forward pass, 0 for a
        rank's whole share; `world_size` ranks.
    Raises: ConfigError if a size is not positive or there are more ranks than samples.
    """
    faults = []
    if global_batch < 1:
        faults.append(
            f"--global-batch {global_batch}: expected at least 1 sample per optimizer step"
        )
    if micro_batch < 0:
        faults.append(
            f"--micro-batch {micro_batch}: expected at least 1 sample, or 0 for a rank's whole share"
        )
    if not faults and global_batch < world_size:
        faults.append(
            f"--global-batch {global_batch} has fewer samples than there are ranks ({world_size}). "
            f"Type --global-batch {world_size} or more, or start at most {global_batch} ranks"
        )
    if faults:
        raise ConfigError(". ".join(faults) + ".")
    if (
        micro_batch
        and global_batch % micro_batch == 0
        and global_batch // micro_batch >= world_size
    ):
        total = global_batch // micro_batch
        bounds = tuple(range(0, global_batch + 1, micro_batch))
        firsts = tuple(_cut(total, parts=world_size))
        return BatchPlan(
            global_batch=global_batch,
            bounds=bounds,
            firsts=firsts,
            is_invariant=True,
            stated=micro_batch,
        )
    share = -(-global_batch // world_size)
    each = -(-share // micro_batch) if micro_batch else 1
    cuts = _cut(global_batch, parts=world_size)
    marks = [0]
    for start, stop in pairwise(cuts):
        marks += [start + cut for cut in _cut(stop - start, parts=min(each, stop - start))[1:]]
    starts = {mark: i for i, mark in enumerate(marks)}
    firsts = tuple(starts[cut] for cut in cuts)
    return BatchPlan(
        global_batch=global_batch,
        bounds=tuple(marks),
        firsts=firsts,
        is_invariant=False,
        stated=micro_batch,
    )


def _cut(size: int, *, parts: int) -> list[int]:
    """Returns parts + 1 boundaries that cut `size` into pieces that differ by at most one, the larger ones first."""
    small, larger = divmod(size, parts)
    return [i * small + min(i, larger) for i in range(parts + 1)]


def describe(plan: BatchPlan) -> str:
    """Returns the split in one line, as it is printed at start.

    For instance `512 global = 2 ranks x 128 micro-batch x 2 accumulation`.
    """
    world_size = len(plan.firsts) - 1
    runs = [plan.of_rank(rank) for rank in range(world_size)]
    sizes = sorted(
        {stop - start for _, start, stop in (piece for run in runs for piece in run)}, reverse=True
    )
    if len(sizes) == 1 and len({len(run) for run in runs}) == 1:
        ranks = "1 rank" if world_size == 1 else f"{world_size} ranks"
        return f"{plan.global_batch} global = {ranks} x {sizes[0]} micro-batch x {len(runs[0])} accumulation"
    shares = [run[-1][2] - run[0][1] for run in runs]
    return f"{plan.global_batch} global = {_sum(shares)}, in micro-batches of {' or '.join(map(str, sizes))}"


def _sum(shares: Sequence[int]) -> str:
    if len(shares) <= 8:
        return " + ".join(map(str, shares))
    counts = {share: shares.count(share) for share in dict.fromkeys(shares)}
    return " + ".join(f"{count} x {share}" for share, count in counts.items())


def splits_that_keep(global_batch: int, *, world_size: int) -> int:
    """Returns the largest micro-batch that divides the global batch into at least `world_size` micro-batches."""
    return max(
        size for size in range(1, global_batch // world_size + 1) if global_batch % size == 0
    )


def fitting_world_sizes(micro_batches: int) -> list[int]:
    """Returns the numbers of ranks that hold whole subtrees of the tree over the micro-batches: a power of two of them each."""
    divisors = [ranks for ranks in range(1, micro_batches + 1) if micro_batches % ranks == 0]
    return [ranks for ranks in divisors if ranks == 1 or (micro_batches // ranks).bit_count() == 1]


def require_subtrees(plan: BatchPlan, *, world_size: int) -> None:
    """Raises: ConfigError if some of the ranks would not hold whole subtrees."""
    whole, micro = plan.global_batch, plan.stated or plan.global_batch
    fitting = fitting_world_sizes(whole // micro) if whole % micro == 0 else []
    if world_size not in fitting:
        raise ConfigError(
            f"--exact: {whole} / {micro} = {whole // micro} micro-batches do not fit {world_size} ranks. "
            f"World sizes that fit: {', '.join(map(str, fitting))}."
        )
