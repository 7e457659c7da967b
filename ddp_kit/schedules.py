"""Learning-rate schedules that count optimizer steps, each a torch LRScheduler.

The optimizer's own rates are the peaks. Epochs do not occur: a schedule is given `total_steps`, so
that it is the same whatever the number of ranks. All of them raise ConfigError if `total_steps` is
not known or the warm-up does not fit into it.
"""

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ddp_kit.errors import ConfigError


def _warmed(
    optimizer: Optimizer, total_steps: int, warmup: float, decay: Callable[[int, int], float]
) -> LambdaLR:
    """Returns a linear warm-up, then `decay(step, steps after the warm-up)`.

    `warmup` is a fraction of `total_steps` if below 1, else a number of steps.

    Raises: ConfigError if there are no steps, or the warm-up does not fit into them.
    """
    if total_steps < 1:
        raise ConfigError(
            "a schedule needs to know how many steps there are: type --epochs N or --max-steps N."
        )
    if not 0 <= warmup <= total_steps:
        raise ConfigError(
            f"a warm-up of {warmup} does not fit into {total_steps} steps: expected a fraction "
            "below 1, or steps."
        )
    rise = round(warmup * total_steps) if warmup < 1 else round(warmup)
    rest = max(total_steps - rise, 1)

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / (rise + 1)
        return decay(step - rise, rest)

    return LambdaLR(optimizer, factor)


def warmup_cosine(
    optimizer: Optimizer, total_steps: int, *, warmup: float = 0.05, final: float = 0.0
) -> LambdaLR:
    """Warm-up, then half a cosine down to `final` times the peak.

    Source: Loshchilov and Hutter, SGDR, arXiv 1608.03983.
    """

    def cosine(step: int, steps: int) -> float:
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(step / steps, 1)))

    return _warmed(optimizer, total_steps, warmup, cosine)


def linear(
    optimizer: Optimizer, total_steps: int, *, warmup: float = 0.05, final: float = 0.0
) -> LambdaLR:
    """Warm-up, then a straight line down to `final` times the peak."""

    def line(step: int, steps: int) -> float:
        return 1 - (1 - final) * min(step / steps, 1)

    return _warmed(optimizer, total_steps, warmup, line)


def step(
    optimizer: Optimizer,
    total_steps: int,
    *,
    at: tuple[float, ...] = (0.5, 0.75),
    factor: float = 0.1,
    warmup: float = 0.0,
) -> LambdaLR:
    """Multiplies the rate by `factor` at each fraction `at` of the steps after the warm-up."""

    def stairs(step: int, steps: int) -> float:
        num_passed = sum(step >= fraction * steps for fraction in at)
        product: float = factor**num_passed
        return product

    return _warmed(optimizer, total_steps, warmup, stairs)


def exponential(
    optimizer: Optimizer, total_steps: int, *, final: float = 0.01, warmup: float = 0.0
) -> LambdaLR:
    """Falls by the same factor at each step, down to `final` times the peak at the end."""

    def curve(step: int, steps: int) -> float:
        power: float = final ** (step / steps)
        return power

    return _warmed(optimizer, total_steps, warmup, curve)
